// ONNX Runtime, loaded from a shared library at run time: its function table and its environment.
#pragma once

#include <onnxruntime_c_api.h>

#include <memory>
#include <string>
#include <vector>

namespace edgelora {

// What ORT hands out, released by the function of the table that made it.
template <typename T>
using OrtHandle = std::unique_ptr<T, void(ORT_API_CALL*)(T*)>;

class OnnxRuntime {
 public:
  // Loads `path`; if it is empty, the system's library by name. Throws Error. The library stays
  // loaded until the process ends.
  explicit OnnxRuntime(const std::string& path);

  const OrtApi& api() const { return *api_; }
  OrtEnv* env() const { return env_.get(); }

  // Throws what `status` says, if it is not null, and releases it.
  void check(OrtStatus* status) const;

  // A tensor [dims] over memory of the caller, which must outlive it.
  OrtHandle<OrtValue> tensor(int64_t* data, std::initializer_list<int64_t> dims) const;
  OrtHandle<OrtValue> tensor(float* data, std::initializer_list<int64_t> dims) const;
  OrtHandle<OrtValue> tensor(uint8_t* data, std::initializer_list<int64_t> dims) const;
  OrtHandle<OrtValue> tensor(void* data, int64_t bytes, const std::vector<int64_t>& dims,
                             ONNXTensorElementDataType type) const;

 private:
  const OrtApi* api_;
  OrtHandle<OrtEnv> env_;  // counted by ORT: all models of one library share one
  OrtHandle<OrtMemoryInfo> memory_;
};

}  // namespace edgelora
