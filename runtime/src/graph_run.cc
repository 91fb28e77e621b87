#include "src/graph_run.h"

#include <algorithm>
#include <utility>

namespace edgelora {
namespace {

OrtHandle<OrtRunOptions> create_options(const OnnxRuntime& ort) {
  OrtRunOptions* options = nullptr;
  ort.check(ort.api().CreateRunOptions(&options));
  return {options, ort.api().ReleaseRunOptions};
}

}  // namespace

void GraphRun::Values::set(const std::string& name, OrtHandle<OrtValue> value) {
  const auto found = std::find(names_.begin(), names_.end(), name);
  if (found != names_.end()) {
    const auto i = static_cast<size_t>(found - names_.begin());
    pointers_[i] = value.get();
    values_[i] = std::move(value);
    return;
  }
  pointers_.push_back(value.get());
  values_.push_back(std::move(value));
  names_.push_back(name);
  name_pointers_.clear();  // the names may have moved
  for (const std::string& known : names_) name_pointers_.push_back(known.c_str());
}

GraphRun::GraphRun(const OnnxRuntime& ort) : ort_(ort), options_(create_options(ort)) {}

void GraphRun::set_input(const std::string& name, OrtHandle<OrtValue> value) {
  inputs_.set(name, std::move(value));
}

void GraphRun::set_output(const std::string& name, OrtHandle<OrtValue> value) {
  outputs_.set(name, std::move(value));
}

void GraphRun::renew_options() { options_ = create_options(ort_); }

void GraphRun::run(OrtSession* session) {
  ort_.check(ort_.api().Run(session, options_.get(), inputs_.names(), inputs_.pointers(),
                            inputs_.size(), outputs_.names(), outputs_.size(),
                            outputs_.pointers()));
}

void GraphRun::terminate() {
  ort_.check(ort_.api().RunOptionsSetTerminate(options_.get()));
}

}  // namespace edgelora
