/* A thread pool for one product at a time, for MLX on Linux (compiled with few_rows.c).

   OpenBLAS's own threads exchange packed blocks many times within a product and spin while they wait. If other
   threads, such as MLX's, use the cores, each wait lasts a time slice of the scheduler, and a product takes
   many times as long as with one thread. Here a product is split into independent parts. Each thread that is
   awake takes the next part; the caller sleeps once, at the end, and never waits for a thread that has not
   started. */

#include <pthread.h>

typedef struct Work {
  void (*part)(const struct Work *, int);
  int parts, next;
} Work;

enum { MOST_THREADS = 64 };
static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER, door = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t begun = PTHREAD_COND_INITIALIZER, ended = PTHREAD_COND_INITIALIZER;
static Work *work;               /* the current product */
static unsigned long count;      /* products so far: a thread joins each once */
static int inside;               /* threads working on it, without the caller */
static int allowed = 1, started; /* most threads for a product, with the caller; threads of the pool */

static void take(Work *w) {
  for (int i; (i = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->parts;) w->part(w, i);
}

static void *helper(void *argument) {
  const int number = (int)(long)argument;
  unsigned long seen = 0;
  pthread_mutex_lock(&door);
  for (;;) {
    while (!work || seen == count || number >= allowed) pthread_cond_wait(&begun, &door);
    Work *mine = work;
    seen = count, inside++;
    pthread_mutex_unlock(&door);
    take(mine);
    pthread_mutex_lock(&door);
    if (--inside == 0) pthread_cond_signal(&ended);
  }
  return 0;
}

/* After a fork only the calling thread exists, and vanished threads may hold the locks. */
static void forget(void) {
  busy = door = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
  begun = ended = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
  work = 0, started = inside = 0;
}

/* Set the number of threads for a product; returns the old number. */
int m2r2kit_set_threads(int threads) {
  static int forks;
  pthread_mutex_lock(&door);
  if (!forks) forks = !pthread_atfork(0, 0, forget);
  int before = allowed;
  allowed = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
  pthread_mutex_unlock(&door);
  return before;
}

static void share_out(Work *w) {
  /* one product at a time uses the pool; other threads of MLX compute theirs alone */
  if (w->parts < 2 || allowed < 2 || pthread_mutex_trylock(&busy)) {
    take(w);
    return;
  }
  pthread_mutex_lock(&door);
  while (started < allowed - 1) {
    pthread_t thread;
    if (pthread_create(&thread, 0, helper, (void *)(long)(started + 1))) break;
    pthread_detach(thread);
    started++;
  }
  work = w, count++;
  pthread_cond_broadcast(&begun);
  pthread_mutex_unlock(&door);
  take(w);
  pthread_mutex_lock(&door);
  work = 0; /* threads that wake up later find no work */
  while (inside) pthread_cond_wait(&ended, &door);
  pthread_mutex_unlock(&door);
  pthread_mutex_unlock(&busy);
}
