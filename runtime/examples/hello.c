/* Generates 16 tokens, then switches the adapter and generates 16 more from the same prompt.
 *
 *   hello BUNDLE LIBONNXRUNTIME ADAPTER TOKEN...      ADAPTER "-": the base again
 */
#include <edgelora.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kNewTokens = 16, kMostPromptTokens = 256 };

static void check(EdgeLoraStatus status) {
  if (status == EDGELORA_OK) return;
  fprintf(stderr, "hello: %s\n", edgelora_last_error());
  exit(1);
}

static bool print_token(int32_t token, void* user_data) {
  fprintf((FILE*)user_data, " %d", (int)token);
  return true;
}

static void generate(EdgeLoraSession* session, const char* name) {
  printf("%s:", name);
  check(
      edgelora_session_generate(session, NULL, kNewTokens, NULL, NULL, NULL, print_token, stdout));
  printf("\n");
}

int main(int argc, char** argv) {
  if (argc < 5 || argc - 4 > kMostPromptTokens) {
    fprintf(stderr, "usage: hello BUNDLE LIBONNXRUNTIME ADAPTER TOKEN...\n");
    return 2;
  }
  int32_t prompt[kMostPromptTokens];
  const size_t prompt_size = (size_t)(argc - 4);
  for (size_t i = 0; i < prompt_size; ++i) prompt[i] = (int32_t)strtol(argv[4 + i], NULL, 10);

  EdgeLoraModelOptions options;
  edgelora_model_options_init(&options);
  options.onnxruntime_path = argv[2];
  EdgeLoraModel* model = NULL;
  check(edgelora_model_load(argv[1], &options, &model));
  EdgeLoraSession* session = NULL;
  check(edgelora_session_create(model, NULL, &session));

  check(edgelora_session_prefill(session, prompt, prompt_size));
  generate(session, "base");

  EdgeLoraAdapter adapter = 0;
  if (strcmp(argv[3], "-") != 0) check(edgelora_adapter_load(model, argv[3], &adapter));
  check(edgelora_session_rewind(session, prompt_size));
  check(edgelora_session_set_adapter(session, adapter, false)); /* the prompt is computed anew */
  generate(session, argv[3]);

  edgelora_session_free(session);
  if (adapter != 0) check(edgelora_adapter_unload(adapter));
  edgelora_model_free(model);
  return 0;
}
