/* Products with few rows, for MLX on Linux (compiled and installed by blas.py).

   Decoding multiplies 1 row by a weight matrix, and verifying K drafts multiplies K + 1 rows.
   OpenBLAS's `sgemm` first repacks the matrix, which pays off for many rows but takes most of
   the time for few. So products of 2..32 rows with a matrix or a transpose (as a linear layer
   stores it), and of 1 row with a matrix, are computed here and read the matrix once; 1 row
   times a transpose goes to `sgemv`. */

typedef int blasint;
#define MATRIX const float *, blasint
void scipy_cblas_sgemm(int, int, int, blasint, blasint, blasint, float, MATRIX, MATRIX, float,
                       float *, blasint);
void scipy_cblas_sgemv(int, int, blasint, blasint, float, MATRIX, MATRIX, float, float *, blasint);

enum { ROW = 101, PLAIN = 111, TRANSPOSED = 112 };
enum { LANES = 8, FEW = 32 };

/* The block of c in registers: up to TALL rows two vectors wide, or up to HALF rows four wide. */
#ifdef __AVX512F__
enum { WIDE = 16, TALL = 8, HALF = 6 };
#define HALVES CASE(4, 4) CASE(5, 4) CASE(6, 4)
#define TALLER(w) CASE(4, w) CASE(5, w) CASE(6, w) CASE(7, w) default: columns(8, w, k, a, lda, b, ldb, c, ldc);
#else
enum { WIDE = 8, TALL = 4, HALF = 3 };
#define HALVES
#define TALLER(w) default: columns(4, w, k, a, lda, b, ldb, c, ldc);
#endif

typedef float wide __attribute__((vector_size(4 * WIDE), aligned(4)));
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int ints __attribute__((vector_size(4 * LANES)));
#ifdef __clang__
#define PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define PICK(x, y, ...) __builtin_shuffle(x, y, (ints){__VA_ARGS__})
#endif
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)
#define LOAD(p) (*(const vec *)(p))

/* These three steps sum eight vectors: lane i of the result is the sum of vector i. */
static inline vec neighbours(vec x, vec y) {
  return PICK(x, y, 0, 8, 2, 10, 4, 12, 6, 14) + PICK(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
}
static inline vec pairs(vec x, vec y) {
  return PICK(x, y, 0, 1, 8, 9, 4, 5, 12, 13) + PICK(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
}
static inline vec halves(vec x, vec y) {
  return PICK(x, y, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
}

/* Eight elements of c, from m rows of a and 8 / m rows of b; each row is loaded once. */
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

/* A block of c, m rows by w vectors: an element of a is loaded once for all columns, and there are
   no sums across a vector. */
static inline __attribute__((always_inline)) void columns(const int m, const int w, blasint k, const float *a,
                                                          long lda, const float *b, long ldb, float *c,
                                                          long ldc) {
  wide s[TALL][4] = {0};
  for (int t = 0; t < k; t++) {
    wide y[4];
    EACH(j, w) y[j] = *(const wide *)(b + t * ldb + j * WIDE);
    EACH(j, w) __builtin_prefetch(b + t * ldb + (w + j) * WIDE); /* the next columns */
    EACH(i, m) EACH(j, w) s[i][j] += a[i * lda + t] * y[j];
  }
  EACH(i, m) EACH(j, w) *(wide *)(c + i * ldc + j * WIDE) = s[i][j];
}

#define CASE(m, w) \
  case m: columns(m, w, k, a, lda, b, ldb, c, ldc); break;

/* c (m, n) = a (m, k) b (k, n), for few rows m. */
static void few_rows_plain(blasint m, blasint n, blasint k, const float *a, long lda, const float *b,
                           long ldb, float *c, long ldc) {
  for (; m > 0; m -= TALL, a += TALL * lda, c += TALL * ldc) {
    const float *b_all = b;
    float *c_all = c;
    int left = n;
    for (; m <= HALF && left >= 4 * WIDE; left -= 4 * WIDE, b += 4 * WIDE, c += 4 * WIDE)
      switch (m) { CASE(1, 4) CASE(2, 4) CASE(3, 4) HALVES }
    for (; left >= 2 * WIDE; left -= 2 * WIDE, b += 2 * WIDE, c += 2 * WIDE)
      switch (m) { CASE(1, 2) CASE(2, 2) CASE(3, 2) TALLER(2) }
    for (; left > 0 && n >= WIDE; left -= WIDE, b += WIDE, c += WIDE) {
      if (left < WIDE) b += left - WIDE, c += left - WIDE; /* the last vectors overlap, with the same result */
      switch (m) { CASE(1, 1) CASE(2, 1) CASE(3, 1) TALLER(1) }
    }
    for (int j = 0; j < left; j++) /* a narrow matrix */
      for (int i = 0; i < m && i < TALL; i++) {
        float x = 0;
        for (int t = 0; t < k; t++) x += a[i * lda + t] * b[t * ldb + j];
        c[i * ldc + j] = x;
      }
    b = b_all, c = c_all;
  }
}

/* --- a product in parts ----------------------------------------------------------------------- */

typedef struct {
  Work work;
  int order, ta, tb, rows; /* rows: whether parts are rows of c, not columns */
  blasint m, n, k, step, lda, ldb, ldc;
  float alpha, beta;
  const float *a, *b;
  float *c;
} Product;

/* `step` rows or columns of c. */
static void part_of_product(const Work *w, int i) {
  const Product *p = (const Product *)w;
  const long at = (long)i * p->step, ta = p->ta == PLAIN ? p->lda : 1, tb = p->tb == PLAIN ? 1 : p->ldb;
  const blasint left = (p->rows ? p->m : p->n) - at, size = left < p->step ? left : p->step;
  const blasint m = p->rows ? size : p->m, n = p->rows ? p->n : size;
  const float *a = p->rows ? p->a + at * ta : p->a, *b = p->rows ? p->b : p->b + at * tb;
  float *c = p->rows ? p->c + at * p->ldc : p->c + at;
  const int simple = p->order == ROW && p->ta == PLAIN && p->alpha == 1 && p->beta == 0 && p->m <= FEW;
  if (simple && p->tb == PLAIN) {
    few_rows_plain(m, n, p->k, a, p->lda, b, p->ldb, c, p->ldc);
  } else if (p->order == ROW && p->ta == PLAIN && p->m == 1) { /* y = op(B)^T x */
    if (p->tb == PLAIN)
      scipy_cblas_sgemv(ROW, TRANSPOSED, p->k, n, p->alpha, b, p->ldb, a, 1, p->beta, c, 1);
    else
      scipy_cblas_sgemv(ROW, PLAIN, n, p->k, p->alpha, b, p->ldb, a, 1, p->beta, c, 1);
  } else if (simple && p->tb == TRANSPOSED) {
    few_rows(m, n, p->k, a, p->lda, b, p->ldb, c, p->ldc);
  } else {
    scipy_cblas_sgemm(p->order, p->ta, p->tb, m, n, p->k, p->alpha, a, p->lda, b, p->ldb, p->beta, c, p->ldc);
  }
}

/* A part takes 100 us or more, because a sleeping thread needs some 50 us to wake up. */
enum { MOST_PARTS = 4 * MOST_THREADS, MULTIPLE = 64, ENOUGH = 1 << 22, READ = 1 << 19 };

void m2r2kit_sgemm(int order, int ta, int tb, blasint m, blasint n, blasint k, float alpha,
                   const float *a, blasint lda, const float *b, blasint ldb, float beta, float *c,
                   blasint ldc) {
  const int rows = m > n;
  const blasint size = rows ? m : n;
  Product p = {{part_of_product, 1, 0}, order, ta, tb, rows, m, n, k, size, lda, ldb, ldc, alpha, beta, a, b, c};
  if (order == ROW) { /* each part needs enough multiplications, or enough of the matrix to read */
    const long by_products = (long)m * n * k / ENOUGH, by_reading = (long)n * k / READ;
    long parts = by_products > by_reading ? by_products : by_reading;
    if (parts > MOST_PARTS) parts = MOST_PARTS;
    if (parts > 4L * allowed) parts = 4L * allowed;
    if (parts > 1 && size >= 2 * MULTIPLE) {
      p.step = ((size + parts - 1) / parts + MULTIPLE - 1) / MULTIPLE * MULTIPLE;
      p.work.parts = (size + p.step - 1) / p.step;
    }
  }
  share_out(&p.work);
}
