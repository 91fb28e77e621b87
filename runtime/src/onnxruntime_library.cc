#include "src/onnxruntime_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "src/ort_error.h"

namespace edgelora {
namespace {

using GetApiBase = const OrtApiBase*(ORT_API_CALL*)();

#if defined(__APPLE__)
constexpr const char* kSystemNames[] = {"libonnxruntime.dylib", "libonnxruntime.1.dylib"};
#else
constexpr const char* kSystemNames[] = {"libonnxruntime.so", "libonnxruntime.so.1"};
#endif

// Never closed: threads and static objects of the library may outlive every model.
GetApiBase find_entry(const char* path, std::string* reason) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* symbol = library == nullptr ? nullptr : dlsym(library, "OrtGetApiBase");
  if (symbol == nullptr) {
    const char* message = dlerror();
    *reason = message == nullptr ? "it has no OrtGetApiBase" : message;
  }
  return reinterpret_cast<GetApiBase>(symbol);
}

GetApiBase load(const std::string& path) {
  std::string reason;
  if (!path.empty()) {
    if (GetApiBase entry = find_entry(path.c_str(), &reason)) return entry;
    throw Error(EDGELORA_RUNTIME, "cannot load onnxruntime from " + path + ": " + reason +
                                      "; install it, or give the path of another");
  }
  for (const char* name : kSystemNames) {
    if (GetApiBase entry = find_entry(name, &reason)) return entry;
  }
  throw Error(EDGELORA_RUNTIME, "cannot load onnxruntime: " + reason +
                                    "; install it or set onnxruntime_path in the model options");
}

// API n came with version 1.n. GetApi writes to stderr when it refuses, so the version is asked
// first.
bool has_api(const char* version) {
  char* end = nullptr;
  const long major = std::strtol(version, &end, 10);
  const long minor = *end == '.' ? std::strtol(end + 1, nullptr, 10) : 0;
  return major > 1 || (major == 1 && minor >= ORT_API_VERSION);
}

const OrtApi* get_api(const std::string& path) {
  const OrtApiBase& base = *load(path)();
  const char* version = base.GetVersionString();
  const OrtApi* api = has_api(version) ? base.GetApi(ORT_API_VERSION) : nullptr;
  if (api != nullptr) return api;
  throw Error(EDGELORA_RUNTIME, (path.empty() ? "" : path + ": ") + "onnxruntime " + version +
                                    " is too old: 1." + std::to_string(ORT_API_VERSION) +
                                    " or newer is needed");
}

void ORT_API_CALL drop_message(void*, OrtLoggingLevel, const char*, const char*, const char*,
                               const char*) {}

void check_status(const OrtApi& api, OrtStatus* status) {
  try {
    check_ort(api, status);
  } catch (const Error& error) {
    throw Error(error.status(), std::string("onnxruntime: ") + error.what());
  }
}

OrtHandle<OrtEnv> create_env(const OrtApi& api) {
  OrtEnv* env = nullptr;
  check_status(api, api.CreateEnvWithCustomLogger(drop_message, nullptr, ORT_LOGGING_LEVEL_FATAL,
                                                  "edgelora", &env));
  OrtHandle<OrtEnv> owned(env, api.ReleaseEnv);
  check_status(api, api.DisableTelemetryEvents(env));
  return owned;
}

OrtHandle<OrtMemoryInfo> create_memory_info(const OrtApi& api) {
  OrtMemoryInfo* memory = nullptr;
  check_status(api, api.CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory));
  return {memory, api.ReleaseMemoryInfo};
}

struct Dims {
  const int64_t* first;
  size_t count;
};

OrtHandle<OrtValue> create_tensor(const OrtApi& api, const OrtMemoryInfo* memory, void* data,
                                  size_t bytes, Dims dims, ONNXTensorElementDataType type) {
  OrtValue* value = nullptr;
  check_status(api, api.CreateTensorWithDataAsOrtValue(memory, data, bytes, dims.first, dims.count,
                                                       type, &value));
  return {value, api.ReleaseValue};
}

template <typename T>
OrtHandle<OrtValue> create_tensor(const OrtApi& api, const OrtMemoryInfo* memory, T* data,
                                  std::initializer_list<int64_t> dims,
                                  ONNXTensorElementDataType type) {
  size_t bytes = sizeof *data;
  for (const int64_t dim : dims) bytes *= static_cast<size_t>(dim);
  return create_tensor(api, memory, data, bytes, Dims{dims.begin(), dims.size()}, type);
}

}  // namespace

OnnxRuntime::OnnxRuntime(const std::string& path)
    : api_(get_api(path)), env_(create_env(*api_)), memory_(create_memory_info(*api_)) {}

void OnnxRuntime::check(OrtStatus* status) const { check_status(*api_, status); }

OrtHandle<OrtValue> OnnxRuntime::tensor(int64_t* data, std::initializer_list<int64_t> dims) const {
  return create_tensor(*api_, memory_.get(), data, dims,
                       ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
}

OrtHandle<OrtValue> OnnxRuntime::tensor(float* data, std::initializer_list<int64_t> dims) const {
  return create_tensor(*api_, memory_.get(), data, dims,
                       ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
}

OrtHandle<OrtValue> OnnxRuntime::tensor(uint8_t* data, std::initializer_list<int64_t> dims) const {
  return create_tensor(*api_, memory_.get(), data, dims,
                       ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
}

OrtHandle<OrtValue> OnnxRuntime::tensor(void* data, int64_t bytes, const std::vector<int64_t>& dims,
                                        ONNXTensorElementDataType type) const {
  return create_tensor(*api_, memory_.get(), data, static_cast<size_t>(bytes),
                       Dims{dims.data(), dims.size()}, type);
}

}  // namespace edgelora
