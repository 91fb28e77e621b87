// The weights of a bundle in one mapping, in whose pages operators and kernels use them in place.
#pragma once

#include <string>
#include <vector>

#include "src/mapped_file.h"
#include "src/onnxruntime_library.h"

namespace edgelora {

// ONNX Runtime by itself maps each initializer alone, wherever there is room: pages of 2 MB cannot
// hold them then, nor would the file come from the disk in such.
class WeightFile {
 public:
  // Maps `data`, and finds in the ONNX model at `model` what lies where. Throws Error.
  WeightFile(const OnnxRuntime& ort, const std::string& model, const std::string& data);

  // Gives a session that is made with `options` the initializers; this must outlive it.
  void share(const OnnxRuntime& ort, OrtSessionOptions* options) const;

 private:
  struct Initializer {
    std::string name;
    OrtHandle<OrtValue> value;
  };

  MappedFile file_;
  std::vector<Initializer> initializers_;
};

}  // namespace edgelora
