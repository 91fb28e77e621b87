// The memory bandwidth that a decode can use: threads read a weight file, mapped as the runtimes
// map it, from end to end, each its own part. Prints the median of the passes in GB/s (10^9 bytes).
//
//   stream FILE THREADS PASSES
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { kMaxThreads = 256, kMaxPasses = 1000, kWords = 32 };  // 32 words: four cache lines

struct Part {
  const uint64_t* words;
  size_t count;  // a multiple of kWords
  int passes;
  pthread_barrier_t* barrier;
  uint64_t sum;
};

static void read_once(struct Part* part) {
  uint64_t sums[kWords] = {0};  // as many independent sums as fill the vector units
  for (size_t i = 0; i < part->count; i += kWords) {
    for (size_t j = 0; j < kWords; ++j) sums[j] += part->words[i + j];
  }
  for (size_t j = 0; j < kWords; ++j) part->sum += sums[j];
}

static void* read_part(void* argument) {
  struct Part* part = argument;
  for (int pass = 0; pass < part->passes; ++pass) {
    pthread_barrier_wait(part->barrier);
    read_once(part);
    pthread_barrier_wait(part->barrier);
  }
  return NULL;
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int ascending(const void* a, const void* b) {
  const double difference = *(const double*)a - *(const double*)b;
  return (difference > 0) - (difference < 0);
}

int main(int argc, char** argv) {
  if (argc != 4) return fprintf(stderr, "usage: stream FILE THREADS PASSES\n"), 2;
  const int threads = atoi(argv[2]), passes = atoi(argv[3]);
  struct stat about;
  const int file = open(argv[1], O_RDONLY);
  if (file < 0 || fstat(file, &about) != 0) return perror(argv[1]), 1;
  if (threads < 1 || threads > kMaxThreads || passes < 1 || passes > kMaxPasses) return 2;
  const size_t count = (size_t)about.st_size / 8 / (size_t)threads / kWords * kWords;
  if (count == 0) return fprintf(stderr, "%s: too small\n", argv[1]), 1;
  const uint64_t* words = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_SHARED, file, 0);
  if (words == MAP_FAILED) return perror(argv[1]), 1;
#ifdef MADV_HUGEPAGE
  madvise((void*)words, (size_t)about.st_size, MADV_HUGEPAGE);  // what is not in memory is read so
#endif

  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, NULL, (unsigned)threads);
  static struct Part parts[kMaxThreads];
  static double seconds[kMaxPasses + 1];
  pthread_t others[kMaxThreads];
  for (int i = 0; i < threads; ++i) {
    parts[i] = (struct Part){words + (size_t)i * count, count, passes + 1, &barrier, 0};
    if (i > 0 && pthread_create(&others[i], NULL, read_part, &parts[i]) != 0) return 1;
  }
  for (int pass = 0; pass <= passes; ++pass) {
    pthread_barrier_wait(&barrier);
    const double begin = now();
    read_once(&parts[0]);
    pthread_barrier_wait(&barrier);
    seconds[pass] = now() - begin;
  }
  uint64_t sum = parts[0].sum;
  for (int i = 1; i < threads; ++i) {
    pthread_join(others[i], NULL);
    sum += parts[i].sum;
  }
  qsort(seconds + 1, (size_t)passes, sizeof(double), ascending);  // the first pass maps the pages
  const double bytes = 8.0 * (double)count * (double)threads;
  printf("%.3f\n", bytes / seconds[1 + passes / 2] / 1e9);
  return sum == 1;  // uses the sum, so that the reads stay
}
