/* hello BUNDLE LIBONNXRUNTIME ADAPTER TOKEN...
 * Generates 16 tokens, then 16 more from the same prompt with the adapter ("-": the base again). */
#include <edgelora.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(EdgeLoraStatus status) {
  if (status == EDGELORA_OK) return;
  fprintf(stderr, "hello: %s\n", edgelora_last_error());
  exit(1);
}

static void generate(EdgeLoraSession* session, const char* name) {
  int32_t tokens[16];
  size_t count = 0;
  check(edgelora_session_generate(session, NULL, 16, tokens, &count, NULL, NULL, NULL));
  printf("%s:", name);
  for (size_t i = 0; i < count; ++i) printf(" %d", (int)tokens[i]);
  printf("\n");
}

int main(int argc, char** argv) {
  int32_t prompt[256];
  const int count = argc - 4;
  if (count < 1 || count > 256) {
    fprintf(stderr, "usage: hello BUNDLE LIBONNXRUNTIME ADAPTER TOKEN... (1 to 256 tokens)\n");
    return 2;
  }
  for (int i = 0; i < count; ++i) prompt[i] = (int32_t)strtol(argv[4 + i], NULL, 10);

  EdgeLoraModelOptions options;
  edgelora_model_options_init(&options);
  options.onnxruntime_path = argv[2];
  EdgeLoraModel* model = NULL;
  check(edgelora_model_load(argv[1], &options, &model));
  EdgeLoraSession* session = NULL;
  check(edgelora_session_create(model, NULL, &session));
  check(edgelora_session_prefill(session, prompt, (size_t)count));
  generate(session, "base");

  EdgeLoraAdapter adapter = 0;
  if (strcmp(argv[3], "-") != 0) check(edgelora_adapter_load(model, argv[3], &adapter));
  check(edgelora_session_rewind(session, (size_t)count));
  check(edgelora_session_set_adapter(session, adapter, false)); /* computes the prompt anew */
  generate(session, argv[3]);

  edgelora_session_free(session);
  if (adapter != 0) check(edgelora_adapter_unload(adapter));
  edgelora_model_free(model);
}
