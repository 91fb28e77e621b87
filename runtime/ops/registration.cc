#include "ops/registration.h"

#include <unistd.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>

#include "ops/operator.h"

namespace edgelora {
namespace {

constexpr const char* kDomain = "edgelora";

// What registrations differ in.
using Key = std::tuple<const OrtApi*, const kernels::KernelTable*, bool, int64_t, bool, pid_t>;

// A domain, the operators it points to, and the threads that they share.
struct Registration {
  Registration(const Key& key)
      : crews(std::get<3>(key), std::get<4>(key)),
        shared{std::get<0>(key), std::get<1>(key), std::get<2>(key), &crews} {
    check_ort(*shared.api, shared.api->CreateCustomOpDomain(kDomain, &domain));
    for (const ops::Operator& op : operators) {
      check_ort(*shared.api, shared.api->CustomOpDomain_Add(domain, &op));
    }
  }

  ops::Crews crews;
  ops::Shared shared;
  ops::Operator operators[5] = {{ops::kAttentionSchema, shared},
                                {ops::kEmbeddingSchema, shared},
                                {ops::kLayerSchema, shared},
                                {ops::kLinearSchema, shared},
                                {ops::kSwiGluSchema, shared}};
  OrtCustomOpDomain* domain = nullptr;
};

// Sessions may outlive whoever registered, and a session tells nobody that it ended: domains are
// kept, one for each combination, and never destroyed (not even at exit, when ONNX Runtime may be
// gone already).
OrtCustomOpDomain* domain_for(const Key& key) {
  static std::mutex mutex;
  static auto& registrations = *new std::map<Key, std::unique_ptr<Registration>>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& entry = registrations[key];
  if (!entry) entry = std::make_unique<Registration>(key);
  return entry->domain;
}

std::string supported_isas(kernels::Features features) {
  std::string names;
  for (int i = 0; kernels::isa_name(i) != nullptr; ++i) {
    if (!kernels::isa_supported(i, features)) continue;
    names += (names.empty() ? "" : ", ") + std::string(kernels::isa_name(i));
  }
  return names;
}

int64_t threads_or_all(int32_t threads) {
  if (threads > 0) return threads;
  const int64_t cores = std::thread::hardware_concurrency();
  return cores > 0 ? cores : 1;
}

}  // namespace

const kernels::KernelTable& selected_kernels() {
  const char* forced = std::getenv("EDGELORA_FORCE_ISA");
  const kernels::Features features = kernels::detect_features();
  const kernels::KernelTable* table = kernels::select_kernels(features, forced);
  if (table == nullptr) {
    throw Error(EDGELORA_INVALID_ARGUMENT,
                std::string("EDGELORA_FORCE_ISA=") + (forced == nullptr ? "" : forced) +
                    " is not available here; choose one of " + supported_isas(features));
  }
  return *table;
}

OrtStatus* register_ops(const OrtApi* api, OrtSessionOptions* options, const OpsOptions& ops) {
  return ops::guarded(*api, [&] {
    const kernels::KernelTable* table = ops.kernels != nullptr ? ops.kernels : &selected_kernels();
    const Key key(api, table, ops.exact, threads_or_all(ops.threads), ops.spinning, getpid());
    check_ort(*api, api->AddCustomOpDomain(options, domain_for(key)));
  });
}

}  // namespace edgelora

// The entry point that ONNX Runtime looks up in a custom-op library.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api != nullptr) return edgelora::register_ops(api, options, {});
  const OrtApi* first = base->GetApi(1);  // every version has it: enough to say no
  return first->CreateStatus(ORT_FAIL, "edgelora needs a newer onnxruntime: at least 1.21");
}
