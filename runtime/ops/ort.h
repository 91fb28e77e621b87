// The few calls of ONNX Runtime's C API that the operators need; failures become exceptions of our
// own inside.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "src/ort_error.h"

namespace edgelora::ops {

// Runs `body` and turns whatever it throws into a status: nothing may cross into ONNX Runtime.
template <typename Body>
OrtStatus* guarded(const OrtApi& api, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return to_ort(api, error);
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ORT_FAIL, kOutOfMemory);
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api.CreateStatus(ORT_FAIL, "edgelora: unknown exception");
  }
}

// Dimensions without an allocation: they are read at every call of every node.
struct Shape {
  static constexpr size_t kMaxRank = 8;
  size_t rank = 0;
  int64_t dims[kMaxRank] = {};

  int64_t last() const { return rank == 0 ? 1 : dims[rank - 1]; }
  int64_t elements() const;  // throws Error on overflow
};

bool operator==(const Shape& left, const Shape& right);
std::string to_string(const Shape& shape);  // "[4, 8, 64]"

struct Tensor {
  ONNXTensorElementDataType type;
  Shape shape;
  const void* data;
};

Tensor view(const OrtApi& api, const OrtValue* value);
Tensor input(const OrtApi& api, const OrtKernelContext* context, size_t index);
std::optional<Tensor> optional_input(const OrtApi& api, const OrtKernelContext* context,
                                     size_t index);
void* output(const OrtApi& api, OrtKernelContext* context, size_t index, const Shape& shape);
float* float_output(const OrtApi& api, OrtKernelContext* context, const Shape& shape);  // the first

// x [batch, sequence, width]; throws Error if it is not.
Tensor read_rows(const OrtApi& api, const OrtKernelContext* context, size_t index, const char* what,
                 int64_t width);
// int64 [batch]; throws Error if it is not.
Tensor read_adapter_ids(const OrtApi& api, const OrtKernelContext* context, size_t index,
                        int64_t batch);

// A node as seen at kernel creation.
class NodeInfo {
 public:
  NodeInfo(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  // A part of the node: attributes by their name behind `prefix`, inputs counted from `first`.
  NodeInfo part(const std::string& prefix, size_t first) const;

  std::string name() const;
  int64_t integer(const char* attribute) const;
  std::vector<int64_t> integers(const char* attribute) const;
  float real(const char* attribute) const;
  std::string text(const char* attribute) const;

  bool has_input(size_t index) const;  // an optional one that is given

  // Nothing when the optional input is absent; throws Error when it is not a constant. The data
  // lives as long as the session.
  std::optional<Tensor> constant(size_t index, const char* what) const;

  // As `constant`, of float32 [size]; null when absent.
  const float* floats(size_t index, const char* what, int64_t size) const;

 private:
  std::string attribute_name(const char* name) const { return prefix_ + name; }

  const OrtApi& api_;
  const OrtKernelInfo* info_;
  std::string prefix_;  // of attributes
  size_t first_ = 0;    // input
};

}  // namespace edgelora::ops
