/* greedy BUNDLE LIBONNXRUNTIME ADAPTER int8|float LOGITS PROMPT TOKEN...
 *
 * The first PROMPT tokens are prefilled, the rest follow one by one: the logits of all positions go
 * to the file LOGITS, float32 [tokens, vocab_size]. Then as many tokens as had followed are
 * generated after the prompt. Prints the ISA and these tokens. ADAPTER "-": the base. */
#include <edgelora.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_TOKENS 256

static void check(EdgeLoraStatus status) {
  if (status == EDGELORA_OK) return;
  fprintf(stderr, "greedy: %s\n", edgelora_last_error());
  exit(1);
}

static EdgeLoraModel* load(const char* bundle, const char* onnxruntime, const char* accuracy) {
  EdgeLoraModelOptions options;
  edgelora_model_options_init(&options);
  options.onnxruntime_path = onnxruntime;
  options.threads = 1;
  options.exact = strcmp(accuracy, "float") == 0;
  EdgeLoraModel* model = NULL;
  check(edgelora_model_load(bundle, &options, &model));
  return model;
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

int main(int argc, char** argv) {
  const int count = argc - 7;
  const long prompt = argc > 7 ? strtol(argv[6], NULL, 10) : 0;
  if (prompt < 1 || prompt > count || count > MOST_TOKENS) {
    fprintf(stderr, "usage: greedy BUNDLE LIBONNXRUNTIME ADAPTER int8|float LOGITS PROMPT TOKEN...\n");
    return 2;
  }
  int32_t tokens[MOST_TOKENS];
  for (int i = 0; i < count; ++i) tokens[i] = (int32_t)strtol(argv[7 + i], NULL, 10);

  EdgeLoraModel* model = load(argv[1], argv[2], argv[4]);
  EdgeLoraModelInfo info = {.size = sizeof info};
  check(edgelora_model_info(model, &info));
  EdgeLoraAdapter adapter = 0;
  if (strcmp(argv[3], "-") != 0) check(edgelora_adapter_load(model, argv[3], &adapter));
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
