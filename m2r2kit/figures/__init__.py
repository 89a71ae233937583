"""Pictures drawn from records and arrays; the same pictures with controls."""
