#include "src/selfcheck_file.h"

#include <utility>

#include "src/bundle_files.h"
#include "src/error.h"
#include "src/json_fields.h"
#include "src/safetensors.h"

namespace edgelora {
namespace {

using Json = JsonFields::Json;

constexpr int64_t kFormatVersion = 1;
constexpr int64_t kSizeLimit = int64_t{16} << 20;  // bytes
constexpr int kDepth = 8;                          // objects and lists in each other

[[noreturn]] void refuse(const std::string& where, const std::string& what) {
  throw Error(EDGELORA_BAD_FILE, where + " " + what + "; export the bundle again");
}

const Json& list_of(const Json& value, size_t size, const std::string& where) {
  if (!value.is_array() || value.size() != size) {
    refuse(where, "is not a list of " + std::to_string(size));
  }
  return value;
}

// Reads selfcheck.json for one model.
class Reader {
 public:
  Reader(const Model& model, std::string path)
      : manifest_(model.manifest()), exact_(model.options().exact), path_(std::move(path)) {}

  Expectations read() {
    const std::string bytes = read_small_file(path_, kSizeLimit);
    const Json json =
        parse_json_object(path_, bytes.data(), bytes.data() + bytes.size(), kDepth);
    const JsonFields root(json, path_);
    check_format(root);
    for (const Json& prompt : root.array("prompts")) read_prompt(prompt, root.where("prompts"));
    for (const Json& entry : root.array("expected")) {
      read_entry(JsonFields(entry, root.where("expected")));
    }
    check_complete();
    return std::move(found_);
  }

 private:
  void check_format(const JsonFields& root) const {
    if (root.text("format") != "edgelora-selfcheck") refuse(path_, "is no self-check of EdgeLoRA");
    const int64_t version = root.integer("format_version", 1, INT64_MAX);
    if (version == kFormatVersion) return;
    throw Error(EDGELORA_BAD_FILE, path_ + ": format_version " + std::to_string(version) +
                                       ", made by a newer EdgeLoRA: update the runtime");
  }

  int32_t token(const Json& value, const std::string& where) const {
    return static_cast<int32_t>(
        JsonFields::integer(value, where, 0, manifest_.model.vocab_size - 1));
  }

  void read_prompt(const Json& values, const std::string& where) {
    std::vector<int32_t> prompt;
    if (values.is_array()) {
      for (const Json& value : values) prompt.push_back(token(value, where));
    }
    const auto most = static_cast<size_t>(manifest_.model.context_length);
    if (prompt.empty() || prompt.size() > most) {
      refuse(where, "is not lists of 1 to " + std::to_string(most) + " tokens");
    }
    found_.prompts.push_back(prompt);
  }

  std::string read_name(const JsonFields& entry) const {
    if (entry.at("adapter").is_null()) return "";
    const std::string name = entry.text("adapter");
    if (manifest_.adapters.count(name) == 0) {
      refuse(entry.where("adapter"), "is \"" + name + "\", which the bundle does not have");
    }
    return name;
  }

  void read_entry(const JsonFields& entry) {
    const std::string name = read_name(entry);
    Expectation expectation;
    expectation.tolerance = entry.number(exact_ ? "float_tolerance" : "int8_tolerance");
    if (expectation.tolerance <= 0) refuse(path_, "has a tolerance that is not above 0");
    const size_t prompts = found_.prompts.size();
    const Json& tokens = list_of(entry.at("tokens"), prompts, entry.where("tokens"));
    const Json& logits = list_of(entry.at("logits"), prompts, entry.where("logits"));
    for (size_t i = 0; i < prompts; ++i) {
      read_prompt_logits(i, {tokens[i], entry.where("tokens")}, {logits[i], entry.where("logits")},
                         &expectation.logits);
    }
    if (expectation.logits.empty()) refuse(entry.where("logits"), "is empty");
    if (!found_.entries.emplace(name, std::move(expectation)).second) {
      refuse(entry.where("adapter"), "is listed twice: \"" + name + "\"");
    }
  }

  struct Part {
    const Json& value;
    std::string where;
  };

  // [positions, top]: of the last positions of the prompt.
  void read_prompt_logits(size_t prompt, const Part& tokens, const Part& logits,
                          std::vector<ExpectedLogit>* out) const {
    const size_t size = found_.prompts[prompt].size();
    const size_t positions = tokens.value.is_array() ? tokens.value.size() : size + 1;
    if (positions > size) refuse(tokens.where, "is not a list of the prompt's positions");
    list_of(logits.value, positions, logits.where);
    for (size_t i = 0; i < positions; ++i) {
      const size_t top = tokens.value[i].size();
      list_of(tokens.value[i], top, tokens.where);
      list_of(logits.value[i], top, logits.where);
      for (size_t j = 0; j < top; ++j) {
        out->push_back({prompt, size - positions + i, token(tokens.value[i][j], tokens.where),
                        JsonFields::number(logits.value[i][j], logits.where)});
      }
    }
  }

  void check_complete() const {
    if (found_.entries.count("") == 0) refuse(path_, "does not have the base");
    for (const std::string& name : manifest_.selfchecked) {
      if (found_.entries.count(name) == 0) {
        refuse(path_, "does not have adapter \"" + name + "\", which the manifest says it has");
      }
    }
  }

  const Manifest& manifest_;
  const bool exact_;
  const std::string path_;
  Expectations found_;
};

}  // namespace

Expectations read_selfcheck(const Model& model) {
  const Manifest& manifest = model.manifest();
  const std::string& file = manifest.selfcheck;
  if (manifest.files.count(file) == 0) {
    throw Error(EDGELORA_NOT_FOUND,
                manifest.folder + ": has no " + file + "; export the bundle again");
  }
  check_content(manifest, file);
  return Reader(model, manifest.path(file)).read();
}

}  // namespace edgelora
