// selfcheck.json: prompts and the logits that a bundle's model must compute (ARCHITECTURE.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/model.h"

namespace edgelora {

struct ExpectedLogit {
  size_t prompt, position;  // the position is counted in the prompt
  int32_t token;
  double value;
};

struct Expectation {
  double tolerance = 0;  // of the model's accuracy
  std::vector<ExpectedLogit> logits;
};

struct Expectations {
  std::vector<std::vector<int32_t>> prompts;   // each of at least one token
  std::map<std::string, Expectation> entries;  // by adapter; "" is the base
};

// Of the model's bundle; it has the base and every adapter that the manifest says is checked.
// Throws Error: EDGELORA_NOT_FOUND if there is no such file, EDGELORA_BAD_FILE.
Expectations read_selfcheck(const Model& model);

}  // namespace edgelora
