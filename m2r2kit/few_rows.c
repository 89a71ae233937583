/* Products with few rows, for MLX on Linux (compiled and put in place by blas.py).

   Decoding multiplies 1 row by a weight matrix, and verifying K drafts multiplies K + 1 rows.
   OpenBLAS's `sgemm` first copies the matrix into another order, which pays for many rows but
   takes most of the time for few. So 1 row goes to `sgemv`, and 2..16 rows times the transpose
   of a matrix (a linear layer's product) are computed here, reading the matrix once. */

typedef int blasint;
#define MATRIX const float *, blasint
void scipy_cblas_sgemm(int, int, int, blasint, blasint, blasint, float, MATRIX, MATRIX, float,
                       float *, blasint);
void scipy_cblas_sgemv(int, int, blasint, blasint, float, MATRIX, MATRIX, float, float *, blasint);

enum { ROW = 101, PLAIN = 111, TRANSPOSED = 112 };
enum { LANES = 8, FEW = 16, LARGE = 1 << 21 }; /* beyond it, OpenBLAS's threads are worth more */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int ints __attribute__((vector_size(4 * LANES)));
#ifdef __clang__
#define PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define PICK(x, y, ...) __builtin_shuffle(x, y, (ints){__VA_ARGS__})
#endif
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)
#define LOAD(p) (*(const vec *)(p))

/* Three of these add the lanes of eight vectors: lane i of the last holds the sum of vector i. */
static inline vec neighbours(vec x, vec y) {
  return PICK(x, y, 0, 8, 2, 10, 4, 12, 6, 14) + PICK(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
}
static inline vec pairs(vec x, vec y) {
  return PICK(x, y, 0, 1, 8, 9, 4, 5, 12, 13) + PICK(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
}
static inline vec halves(vec x, vec y) {
  return PICK(x, y, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
}

/* Eight numbers of c: m rows of a meet 8 / m rows of b; each is loaded once. */
static inline __attribute__((always_inline)) void dots(const int m, blasint k, const float *a, long lda,
                                                       const float *b, long ldb, float *c, long ldc) {
  const int w = 8 / m;
  vec s[8] = {0};
  int t = 0;
  for (; t + LANES <= k; t += LANES) {
    vec x[4];
    EACH(i, m) x[i] = LOAD(a + i * lda + t);
    EACH(j, w) {
      vec y = LOAD(b + j * ldb + t);
      EACH(i, m) s[i * w + j] += x[i] * y;
    }
  }
  vec sum = halves(pairs(neighbours(s[0], s[1]), neighbours(s[2], s[3])),
                   pairs(neighbours(s[4], s[5]), neighbours(s[6], s[7])));
  EACH(i, m) EACH(j, w) {
    float x = sum[i * w + j];
    for (int r = t; r < k; r++) x += a[i * lda + r] * b[j * ldb + r];
    c[i * ldc + j] = x;
  }
}

/* c (m, n) = a (m, k) b (n, k)^T, for few rows m. */
static void few_rows(blasint m, blasint n, blasint k, const float *a, long lda, const float *b, long ldb,
                     float *c, long ldc) {
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    int i = 0;
    for (; i + 4 <= m; i += 4)
      for (int h = j; h < j + 8; h += 2)
        dots(4, k, a + i * lda, lda, b + h * ldb, ldb, c + i * ldc + h, ldc);
    for (; i + 2 <= m; i += 2)
      for (int h = j; h < j + 8; h += 4)
        dots(2, k, a + i * lda, lda, b + h * ldb, ldb, c + i * ldc + h, ldc);
    for (; i < m; i++) dots(1, k, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc);
  }
  for (; j < n; j++)
    for (int i = 0; i < m; i++) {
      float x = 0;
      for (int t = 0; t < k; t++) x += a[i * lda + t] * b[j * ldb + t];
      c[i * ldc + j] = x;
    }
}

void m2r2kit_sgemm(int order, int ta, int tb, blasint m, blasint n, blasint k, float alpha,
                   const float *a, blasint lda, const float *b, blasint ldb, float beta, float *c,
                   blasint ldc) {
  if (order == ROW && ta == PLAIN && m == 1) { /* y = op(B)^T x */
    if (tb == PLAIN)
      scipy_cblas_sgemv(ROW, TRANSPOSED, k, n, alpha, b, ldb, a, 1, beta, c, 1);
    else
      scipy_cblas_sgemv(ROW, PLAIN, n, k, alpha, b, ldb, a, 1, beta, c, 1);
  } else if (order == ROW && ta == PLAIN && tb == TRANSPOSED && m <= FEW && alpha == 1 && beta == 0 &&
             (long)n * k <= LARGE) {
    few_rows(m, n, k, a, lda, b, ldb, c, ldc);
  } else {
    scipy_cblas_sgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
}
