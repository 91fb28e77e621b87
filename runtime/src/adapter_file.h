// One adapter.safetensors, mapped and checked. Immutable.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "src/adapter_store.h"
#include "src/mapped_file.h"

namespace edgelora {

class AdapterFile {
 public:
  // Throws Error: one line with the file, what is wrong and what to do.
  AdapterFile(const std::string& path, const std::string& base_fingerprint, const Targets& targets,
              const PrefixShape& shape);

  // Null if the adapter leaves the target alone.
  const SideBranch* branch(const std::string& target) const;

  const std::map<std::string, SideBranch>& branches() const { return branches_; }

  // Null if it puts nothing before the text; else it has no branches.
  const Prefix* prefix() const { return prefix_ ? &*prefix_ : nullptr; }

  const std::string& base_fingerprint() const { return base_fingerprint_; }

  // Tokens from which on it acts; empty: everywhere.
  const std::vector<int32_t>& invocation() const { return invocation_; }

 private:
  void pack();

  MappedFile file_;
  std::optional<HugePages> packed_;  // what branches point into
  std::string base_fingerprint_;
  std::vector<int32_t> invocation_;
  std::map<std::string, SideBranch> branches_;  // by target
  std::optional<Prefix> prefix_;
};

}  // namespace edgelora
