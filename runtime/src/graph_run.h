// The arguments of one session's runs of the graph: values by name, and options.
#pragma once

#include <string>
#include <vector>

#include "src/onnxruntime_library.h"

namespace edgelora {

// Plain Run, not an OrtIoBinding: with a binding ORT leaves active adapters aside.
class GraphRun {
 public:
  explicit GraphRun(const OnnxRuntime& ort);

  // A value that every run from now on has, in the place of a former one of the name.
  void set_input(const std::string& name, OrtHandle<OrtValue> value);
  void set_output(const std::string& name, OrtHandle<OrtValue> value);

  // Fresh options: no active adapter, not terminated.
  void renew_options();
  OrtRunOptions* options() const { return options_.get(); }

  // Computes the outputs in their place. Throws Error.
  void run(OrtSession* session);

  // Makes a run with the present options fail. From any thread, but not beside renew_options.
  void terminate();

 private:
  class Values {
   public:
    void set(const std::string& name, OrtHandle<OrtValue> value);
    size_t size() const { return values_.size(); }
    const char* const* names() const { return name_pointers_.data(); }
    OrtValue** pointers() { return pointers_.data(); }  // none is null: a run replaces none

   private:
    std::vector<std::string> names_;
    std::vector<OrtHandle<OrtValue>> values_;
    std::vector<const char*> name_pointers_;
    std::vector<OrtValue*> pointers_;
  };

  const OnnxRuntime& ort_;
  Values inputs_;
  Values outputs_;
  OrtHandle<OrtRunOptions> options_;
};

}  // namespace edgelora
