"""What a CPU needs: a real BLAS, threads, vectorised math, several processes. Mac readers skip it."""
