// The C API: each function is one call into C++ inside `guard`, which turns exceptions into a
// status and a message.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "edgelora.h"
#include "src/adapter_store.h"
#include "src/error.h"
#include "src/model.h"
#include "src/selfcheck.h"
#include "src/session.h"

struct EdgeLoraModel {
  std::shared_ptr<const edgelora::Model> model;
};

// Shared with a running generate, whose callback may free it.
struct EdgeLoraSession {
  std::shared_ptr<edgelora::Session> session;
};

namespace {

using edgelora::AdapterStore;
using edgelora::Error;

// An array, so that keeping a message never allocates.
thread_local char last_message[4096] = "";

bool continues_character(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

// Bytes of `message` that there is room for: whole characters, if it is UTF-8.
size_t size_kept(const char* message) {
  constexpr size_t kRoom = sizeof last_message - 1, kLongestCharacter = 4;  // bytes
  const size_t size = std::strlen(message);
  if (size <= kRoom) return size;
  for (size_t cut = kRoom; cut > kRoom - kLongestCharacter; --cut) {
    if (!continues_character(message[cut])) return cut;
  }
  return kRoom;
}

// The one place where a status leaves: its message is set with it, on one line.
EdgeLoraStatus fail(EdgeLoraStatus status, const char* message) {
  const size_t size = size_kept(message);
  std::replace_copy(message, message + size, last_message, '\n', ' ');
  last_message[size] = '\0';
  return status;
}

template <typename Call>
EdgeLoraStatus guard(const Call& call) noexcept {
  try {
    call();
    return EDGELORA_OK;
  } catch (const Error& error) {
    return fail(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(EDGELORA_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(EDGELORA_INTERNAL, error.what());
  } catch (...) {
    return fail(EDGELORA_INTERNAL, "unknown exception");
  }
}

template <typename T>
T& require(T* pointer, const char* name) {
  if (pointer == nullptr) throw Error(EDGELORA_INVALID_ARGUMENT, std::string(name) + " is null");
  return *pointer;
}

// An option struct of another size has fields that this library does not know, or lacks some.
template <typename Struct>
Struct& require_struct(Struct* pointer, const char* name) {
  if (require(pointer, name).size == sizeof(Struct)) return *pointer;
  throw Error(EDGELORA_INVALID_ARGUMENT,
              std::string(name) + ": size is " + std::to_string(pointer->size) + ", not " +
                  std::to_string(sizeof(Struct)) +
                  ": initialise it with the header of this version, " + EDGELORA_VERSION);
}

edgelora::ModelOptions model_options(const EdgeLoraModelOptions* given) {
  edgelora::ModelOptions options;
  if (given == nullptr) return options;
  require_struct(given, "options");
  if (given->onnxruntime_path != nullptr) options.onnxruntime_path = given->onnxruntime_path;
  options.threads = given->threads;
  options.spinning = given->spinning;
  options.exact = given->exact;
  return options;
}

edgelora::SessionOptions session_options(const EdgeLoraSessionOptions* given) {
  if (given == nullptr) return {};
  require_struct(given, "options");
  return {given->context_length, given->invoked};
}

EdgeLoraModelInfo model_info(const edgelora::Model& model) {
  const edgelora::ManifestModel& shape = model.manifest().model;
  EdgeLoraModelInfo info;
  info.size = sizeof info;
  info.vocab_size = shape.vocab_size;
  info.context_length = shape.context_length;
  info.num_hidden_layers = shape.num_hidden_layers;
  info.threads = model.threads();
  info.weight_bytes = model.weight_bytes();
  info.kv_cache_bytes = model.kv_format().position_bytes(shape);
  info.eos_token_count = static_cast<int32_t>(shape.eos_token_ids.size());
  info.eos_token_ids = shape.eos_token_ids.data();
  info.isa = model.flavor().isa();
  info.adapter_count = static_cast<int32_t>(model.adapter_names().size());
  info.adapter_names = model.adapter_names().data();
  return info;
}

EdgeLoraSampling default_sampling() {
  EdgeLoraSampling sampling;
  edgelora_sampling_init(&sampling);
  return sampling;
}

edgelora::GenerateOptions generate_options(const EdgeLoraSampling& given,
                                           const edgelora::Model& model) {
  require_struct(&given, "sampling");
  edgelora::GenerateOptions options{};
  options.sampling.temperature = given.temperature;
  options.sampling.top_k = given.top_k;
  options.sampling.top_p = given.top_p;
  options.sampling.min_p = given.min_p;
  options.sampling.repetition_penalty = given.repetition_penalty;
  options.sampling.seed = given.seed;
  if (!given.ignore_eos) options.stop_tokens = model.manifest().model.eos_token_ids;
  if (given.stop_token_count > 0) {
    const int32_t* begin = &require(given.stop_tokens, "stop_tokens");
    options.stop_tokens.insert(options.stop_tokens.end(), begin, begin + given.stop_token_count);
  }
  return options;
}

}  // namespace

extern "C" {

const char* edgelora_version(void) { return EDGELORA_VERSION; }

const char* edgelora_last_error(void) { return last_message; }

void edgelora_model_options_init(EdgeLoraModelOptions* options) {
  if (options != nullptr) *options = {sizeof *options, nullptr, 0, true, false};
}

EdgeLoraStatus edgelora_model_load(const char* bundle, const EdgeLoraModelOptions* options,
                                   EdgeLoraModel** model) {
  return guard([&] {
    require(bundle, "bundle");
    require(model, "model");
    *model =
        new EdgeLoraModel{std::make_shared<const edgelora::Model>(bundle, model_options(options))};
  });
}

void edgelora_model_free(EdgeLoraModel* model) { delete model; }

EdgeLoraStatus edgelora_model_info(const EdgeLoraModel* model, EdgeLoraModelInfo* info) {
  return guard([&] {
    require(model, "model");
    require_struct(info, "info") = model_info(*model->model);
  });
}

EdgeLoraStatus edgelora_model_selfcheck(const EdgeLoraModel* model,
                                        EdgeLoraSelfcheckCallback callback, void* user_data) {
  return guard([&] {
    edgelora::selfcheck(require(model, "model").model, [&](const EdgeLoraSelfcheck& result) {
      if (callback != nullptr) callback(&result, user_data);
    });
  });
}

EdgeLoraStatus edgelora_adapter_load(EdgeLoraModel* model, const char* name,
                                     EdgeLoraAdapter* adapter) {
  return guard([&] {
    require(name, "name");
    require(adapter, "adapter");
    *adapter = require(model, "model").model->load_adapter(name);
  });
}

EdgeLoraStatus edgelora_adapter_load_file(EdgeLoraModel* model, const char* path,
                                          EdgeLoraAdapter* adapter) {
  return guard([&] {
    require(path, "path");
    require(adapter, "adapter");
    *adapter = require(model, "model").model->load_adapter_file(path);
  });
}

EdgeLoraStatus edgelora_adapter_compose(const EdgeLoraAdapter* adapters, const float* weights,
                                        size_t count, EdgeLoraAdapter* adapter) {
  return guard([&] {
    require(adapters, "adapters");
    require(weights, "weights");
    require(adapter, "adapter");
    *adapter = AdapterStore::instance().compose(adapters, weights, static_cast<int64_t>(count));
  });
}

EdgeLoraStatus edgelora_adapter_unload(EdgeLoraAdapter adapter) {
  return guard([&] { AdapterStore::instance().unload(adapter); });
}

void edgelora_session_options_init(EdgeLoraSessionOptions* options) {
  if (options != nullptr) *options = {sizeof *options, 0, false};
}

EdgeLoraStatus edgelora_session_create(EdgeLoraModel* model, const EdgeLoraSessionOptions* options,
                                       EdgeLoraSession** session) {
  return guard([&] {
    require(model, "model");
    require(session, "session");
    *session = new EdgeLoraSession{
        std::make_shared<edgelora::Session>(model->model, session_options(options))};
  });
}

void edgelora_session_free(EdgeLoraSession* session) { delete session; }

EdgeLoraStatus edgelora_session_set_adapter(EdgeLoraSession* session, EdgeLoraAdapter adapter,
                                            bool keep_cache) {
  using Cache = edgelora::Session::Cache;
  return guard([&] {
    require(session, "session")
        .session->set_adapter(adapter, keep_cache ? Cache::kKeep : Cache::kRecompute);
  });
}

EdgeLoraStatus edgelora_session_prefill(EdgeLoraSession* session, const int32_t* tokens,
                                        size_t count) {
  return guard([&] {
    if (count > 0) require(tokens, "tokens");
    require(session, "session").session->prefill(tokens, count);
  });
}

EdgeLoraStatus edgelora_session_logits(EdgeLoraSession* session, const int32_t* tokens,
                                       size_t count, float* logits) {
  return guard([&] {
    if (count > 0) require(tokens, "tokens");
    require(logits, "logits");
    require(session, "session").session->logits(tokens, count, logits);
  });
}

const float* edgelora_session_last_logits(const EdgeLoraSession* session) {
  return session == nullptr ? nullptr : session->session->last_logits();
}

size_t edgelora_session_position(const EdgeLoraSession* session) {
  return session == nullptr ? 0 : session->session->position();
}

EdgeLoraStatus edgelora_session_rewind(EdgeLoraSession* session, size_t position) {
  return guard([&] { require(session, "session").session->rewind(position); });
}

void edgelora_sampling_init(EdgeLoraSampling* sampling) {
  if (sampling != nullptr) *sampling = {sizeof *sampling, 0, 0, 1, 0, 1, 0, nullptr, 0, false};
}

EdgeLoraStatus edgelora_session_generate(EdgeLoraSession* session, const EdgeLoraSampling* sampling,
                                         size_t max_new_tokens, int32_t* tokens, size_t* count,
                                         EdgeLoraFinish* finish, EdgeLoraTokenCallback callback,
                                         void* user_data) {
  return guard([&] {
    const std::shared_ptr<edgelora::Session> running = require(session, "session").session;
    edgelora::GenerateOptions options =
        generate_options(sampling == nullptr ? default_sampling() : *sampling, running->model());
    options.max_new_tokens = max_new_tokens;
    options.callback = callback;
    options.user_data = user_data;
    const edgelora::GenerateResult result = running->generate(options, tokens);
    if (count != nullptr) *count = result.count;
    if (finish != nullptr) *finish = result.finish;
  });
}

void edgelora_session_cancel(EdgeLoraSession* session) {
  if (session == nullptr) return;
  guard([&] { session->session->cancel(); });
}

EdgeLoraStatus edgelora_session_timings(const EdgeLoraSession* session, EdgeLoraTimings* timings) {
  return guard([&] {
    const edgelora::Timings& last = require(session, "session").session->timings();
    require_struct(timings, "timings") = {sizeof *timings, last.prefill_seconds,
                                          last.prefill_tokens, last.decode_seconds,
                                          last.decode_tokens};
  });
}

}  // extern "C"
