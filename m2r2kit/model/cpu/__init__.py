"""CPU support: BLAS, threads, vectorised math and several processes. Readers on a Mac can skip it."""
