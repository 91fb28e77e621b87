/* greedy BUNDLE LIBONNXRUNTIME ADAPTER int8|float LOGITS PROMPT TOKEN...
 * greedy --memory BUNDLE LIBONNXRUNTIME ADAPTER THREADS PROMPT NEW
 * greedy --switch BUNDLE LIBONNXRUNTIME THREADS SWITCHES ADAPTER...
 * greedy --selfcheck BUNDLE LIBONNXRUNTIME
 *
 * The first PROMPT tokens are prefilled, the rest follow one by one: the logits of all positions go
 * to the file LOGITS, float32 [tokens, vocab_size]. Then as many tokens as had followed are
 * generated after the prompt. Prints the ISA and these tokens. ADAPTER "-": the base.
 *
 * --memory: any PROMPT tokens are prefilled and NEW ones generated in a context that they fill.
 * Prints the bytes of the weights and of the kv_cache, then this process's memory in the lines of
 * /proc/self/status.
 *
 * --switch: one adapter after the other, with a step of decode between switches. Prints the
 * microseconds of each.
 *
 * --selfcheck: prints a line for each result: the adapter or "-", float or int8, error,
 * tolerance. */
#include <edgelora.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MOST_TOKENS 256
#define MOST_ADAPTERS 16

static void check(EdgeLoraStatus status) {
  if (status == EDGELORA_OK) return;
  fprintf(stderr, "greedy: %s\n", edgelora_last_error());
  exit(1);
}

static EdgeLoraModel* load(const char* bundle, const char* onnxruntime, const char* accuracy,
                           int32_t threads) {
  EdgeLoraModelOptions options;
  edgelora_model_options_init(&options);
  options.onnxruntime_path = onnxruntime;
  options.threads = threads;
  options.exact = strcmp(accuracy, "float") == 0;
  EdgeLoraModel* model = NULL;
  check(edgelora_model_load(bundle, &options, &model));
  return model;
}

/* 0 for "-". */
static EdgeLoraAdapter load_adapter(EdgeLoraModel* model, const char* name) {
  EdgeLoraAdapter adapter = 0;
  if (strcmp(name, "-") != 0) check(edgelora_adapter_load(model, name, &adapter));
  return adapter;
}

static EdgeLoraModelInfo info_of(const EdgeLoraModel* model) {
  EdgeLoraModelInfo info = {.size = sizeof info};
  check(edgelora_model_info(model, &info));
  return info;
}

/* Its steps' last logits; afterwards the session holds `prompt` tokens. */
static void write_logits(EdgeLoraSession* session, const int32_t* tokens, size_t prompt,
                         size_t count, size_t vocab_size, FILE* file) {
  float* logits = malloc(prompt * vocab_size * sizeof *logits);
  if (logits == NULL) abort();
  check(edgelora_session_logits(session, tokens, prompt, logits));
  fwrite(logits, sizeof *logits, prompt * vocab_size, file);
  free(logits);
  for (size_t i = prompt; i < count; ++i) {
    check(edgelora_session_prefill(session, tokens + i, 1));
    fwrite(edgelora_session_last_logits(session), sizeof(float), vocab_size, file);
  }
  check(edgelora_session_rewind(session, prompt - 1));
  check(edgelora_session_prefill(session, tokens + prompt - 1, 1));
}

static void generate(EdgeLoraSession* session, size_t count, const char* isa) {
  EdgeLoraSampling sampling;
  edgelora_sampling_init(&sampling);
  sampling.ignore_eos = true;
  int32_t tokens[MOST_TOKENS];
  check(edgelora_session_generate(session, &sampling, count, tokens, &count, NULL, NULL, NULL));
  printf("%s:", isa);
  for (size_t i = 0; i < count; ++i) printf(" %d", (int)tokens[i]);
  printf("\n");
}

static void print_memory(void) {
  FILE* file = fopen("/proc/self/status", "r");
  if (file == NULL) abort();
  char line[256];
  while (fgets(line, sizeof line, file) != NULL)
    if (strncmp(line, "VmHWM", 5) == 0 || strncmp(line, "VmRSS", 5) == 0 ||
        strncmp(line, "Rss", 3) == 0)
      fputs(line, stdout);
  fclose(file);
}

static void fill(EdgeLoraSession* session, size_t prompt, size_t new_tokens, size_t vocab_size) {
  int32_t* tokens = malloc((prompt + new_tokens) * sizeof *tokens);
  if (tokens == NULL) abort();
  for (size_t i = 0; i < prompt; ++i) tokens[i] = (int32_t)((7 * i + 11) % vocab_size);
  EdgeLoraSampling sampling;
  edgelora_sampling_init(&sampling);
  sampling.ignore_eos = true;
  check(edgelora_session_prefill(session, tokens, prompt));
  check(edgelora_session_generate(session, &sampling, new_tokens, tokens + prompt, NULL, NULL, NULL,
                                  NULL));
  free(tokens);
}

/* arguments: those behind --memory. */
static int measure_memory(char** arguments) {
  const long prompt = strtol(arguments[4], NULL, 10), new_tokens = strtol(arguments[5], NULL, 10);
  if (prompt < 1 || new_tokens < 1) return 2;
  EdgeLoraModel* model =
      load(arguments[0], arguments[1], "int8", (int32_t)strtol(arguments[3], NULL, 10));
  const EdgeLoraModelInfo info = info_of(model);
  const EdgeLoraAdapter adapter = load_adapter(model, arguments[2]);
  EdgeLoraSessionOptions options;
  edgelora_session_options_init(&options);
  options.context_length = (int32_t)(prompt + new_tokens);
  EdgeLoraSession* session = NULL;
  check(edgelora_session_create(model, &options, &session));
  check(edgelora_session_set_adapter(session, adapter, false));
  fill(session, (size_t)prompt, (size_t)new_tokens, (size_t)info.vocab_size);
  printf("weights: %lld B\nkv_cache: %lld B\n", (long long)info.weight_bytes,
         (long long)(info.kv_cache_bytes * options.context_length));
  print_memory();
  edgelora_session_free(session);
  edgelora_model_free(model);
  return 0;
}

static double microseconds(void) {
  struct timespec now;
  timespec_get(&now, TIME_UTC);
  return 1e6 * (double)now.tv_sec + 1e-3 * (double)now.tv_nsec;
}

static void step(EdgeLoraSession* session) {
  const int32_t token = 7;
  check(edgelora_session_prefill(session, &token, 1));
}

/* arguments: those behind --switch. */
static int measure_switches(char** arguments, int count) {
  const int adapters = count - 4;
  const long switches = strtol(arguments[3], NULL, 10);
  if (adapters < 1 || adapters > MOST_ADAPTERS || switches < 1) return 2;
  EdgeLoraModel* model =
      load(arguments[0], arguments[1], "int8", (int32_t)strtol(arguments[2], NULL, 10));
  EdgeLoraAdapter handles[MOST_ADAPTERS];
  for (int i = 0; i < adapters; ++i) handles[i] = load_adapter(model, arguments[4 + i]);
  EdgeLoraSession* session = NULL;
  check(edgelora_session_create(model, NULL, &session));
  step(session);
  for (long i = 0; i < switches; ++i) {
    if (i % 256 == 255) check(edgelora_session_rewind(session, 1));
    step(session);
    const double started = microseconds();
    check(edgelora_session_set_adapter(session, handles[i % adapters], true));
    printf("%.3f\n", microseconds() - started);
  }
  edgelora_session_free(session);
  edgelora_model_free(model);
  return 0;
}

static void print_result(const EdgeLoraSelfcheck* result, void* user_data) {
  (void)user_data;
  printf("%s %s %g %g\n", result->adapter == NULL ? "-" : result->adapter,
         result->exact ? "float" : "int8", result->error, result->tolerance);
}

static int selfcheck(const char* bundle, const char* onnxruntime) {
  EdgeLoraModel* model = load(bundle, onnxruntime, "int8", 1);
  check(edgelora_model_selfcheck(model, print_result, NULL));
  edgelora_model_free(model);
  return 0;
}

int main(int argc, char** argv) {
  if (argc == 8 && strcmp(argv[1], "--memory") == 0) return measure_memory(argv + 2);
  if (argc > 6 && strcmp(argv[1], "--switch") == 0) return measure_switches(argv + 2, argc - 2);
  if (argc == 4 && strcmp(argv[1], "--selfcheck") == 0) return selfcheck(argv[2], argv[3]);
  const int count = argc - 7;
  const long prompt = argc > 7 ? strtol(argv[6], NULL, 10) : 0;
  if (prompt < 1 || prompt > count || count > MOST_TOKENS) {
    fprintf(stderr,
            "usage: greedy BUNDLE LIBONNXRUNTIME ADAPTER int8|float LOGITS PROMPT TOKEN...\n");
    return 2;
  }
  int32_t tokens[MOST_TOKENS];
  for (int i = 0; i < count; ++i) tokens[i] = (int32_t)strtol(argv[7 + i], NULL, 10);

  EdgeLoraModel* model = load(argv[1], argv[2], argv[4], 1);
  const EdgeLoraModelInfo info = info_of(model);
  const EdgeLoraAdapter adapter = load_adapter(model, argv[3]);
  EdgeLoraSession* session = NULL;
  check(edgelora_session_create(model, NULL, &session));
  check(edgelora_session_set_adapter(session, adapter, false));

  FILE* file = fopen(argv[5], "wb");
  if (file == NULL) {
    perror(argv[5]);
    return 1;
  }
  write_logits(session, tokens, (size_t)prompt, (size_t)count, (size_t)info.vocab_size, file);
  if (fclose(file) != 0) abort();
  generate(session, (size_t)(count - prompt), info.isa);

  edgelora_session_free(session);
  if (adapter != 0) check(edgelora_adapter_unload(adapter));
  edgelora_model_free(model);
}
