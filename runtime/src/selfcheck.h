// Whether a loaded model computes what its bundle expects (ARCHITECTURE.md, "selfcheck.json").
#pragma once

#include <functional>
#include <memory>

#include "edgelora.h"
#include "src/model.h"

namespace edgelora {

using Report = std::function<void(const EdgeLoraSelfcheck&)>;

// Reports the base, then each adapter: of the bundle loaded with float32 activations for it, which
// tells the files' faults best (not in flavor ort), then of the model as it is. Throws Error with
// EDGELORA_SELFCHECK_FAILED after the first that is beyond its tolerance; EDGELORA_BAD_FILE or
// EDGELORA_NOT_FOUND for the file.
void selfcheck(const std::shared_ptr<const Model>& model, const Report& report);

}  // namespace edgelora
