#include "src/manifest.h"

#include <limits>
#include <set>

#include "src/bundle_files.h"
#include "src/error.h"
#include "src/json_fields.h"
#include "src/safetensors.h"
#include "src/sha256.h"

namespace edgelora {
namespace {

using Json = nlohmann::json;

constexpr int64_t kFormatVersion = 1;
constexpr int64_t kManifestLimit = int64_t{64} << 20;  // bytes
constexpr int kManifestDepth = 32;                     // objects and lists in each other
constexpr int64_t kFileLimit = int64_t{1} << 50;       // bytes
constexpr int64_t kHashLimit = int64_t{16} << 20;      // bytes

// Generous bounds that keep every product of two of them, and the kv_cache's size, inside int64.
constexpr int64_t kMaxLayers = 1 << 10;
constexpr int64_t kMaxHeads = 1 << 10;
constexpr int64_t kMaxHeadDim = 1 << 11;
constexpr int64_t kMaxFeatures = 1 << 26;
constexpr int64_t kMaxVocabulary = 1 << 26;
constexpr int64_t kMaxContext = 1 << 26;

bool is_hex64(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

void check_format(const JsonFields& root, const std::string& path) {
  if (root.text("format") != "edgelora-bundle") {
    throw Error(EDGELORA_BAD_FILE, path + ": not the manifest of an EdgeLoRA bundle");
  }
  const int64_t version = root.integer("format_version", 1, std::numeric_limits<int64_t>::max());
  if (version > kFormatVersion) {
    throw Error(EDGELORA_BAD_FILE, path + ": format_version " + std::to_string(version) +
                                       ", made by a newer EdgeLoRA: update the runtime");
  }
}

// The digest is over the file with the digest's own 64 digits replaced by '0'.
void check_digest(const JsonFields& root, std::string bytes, const std::string& path) {
  const std::string digest = root.text("digest");
  const size_t position = bytes.find('"' + digest + '"');
  if (is_hex64(digest) && position != std::string::npos) {
    bytes.replace(position + 1, digest.size(), digest.size(), '0');
    Sha256 hash;
    hash.update(bytes.data(), bytes.size());
    if (hash.finish() == digest) return;
  }
  throw Error(EDGELORA_BAD_FILE,
              path + ": does not fit its own digest: changed or damaged; copy the bundle again");
}

std::vector<int32_t> read_eos(const JsonFields& model, int32_t vocab_size) {
  std::vector<int32_t> ids;
  for (const Json& id : model.array("eos_token_ids")) {
    ids.push_back(static_cast<int32_t>(
        JsonFields::integer(id, model.where("eos_token_ids"), 0, vocab_size - 1)));
  }
  return ids;
}

ManifestModel read_model(const JsonFields& fields) {
  const auto number = [&](const char* key, int64_t high) {
    return static_cast<int32_t>(fields.integer(key, 1, high));
  };
  ManifestModel model;
  model.num_hidden_layers = number("num_hidden_layers", kMaxLayers);
  model.num_key_value_heads = number("num_key_value_heads", kMaxHeads);
  model.head_dim = number("head_dim", kMaxHeadDim);
  model.vocab_size = number("vocab_size", kMaxVocabulary);
  model.context_length = number("context_length", kMaxContext);
  number("hidden_size", kMaxFeatures);
  if (!fields.at("bos_token_id").is_null()) fields.integer("bos_token_id", 0, model.vocab_size - 1);
  model.eos_token_ids = read_eos(fields, model.vocab_size);
  return model;
}

std::string read_fingerprint(const JsonFields& base) {
  const std::string fingerprint = base.text("fingerprint");
  if (fingerprint.rfind("sha256:", 0) != 0 || !is_hex64(fingerprint.substr(7))) {
    throw Error(EDGELORA_BAD_FILE,
                base.where("fingerprint") + " is not \"sha256:\" and 64 hex digits");
  }
  return fingerprint;
}

void read_targets(const JsonFields& root, Manifest* manifest) {
  for (const Json& entry : root.array("targets")) {
    const JsonFields target(entry, root.where("targets"));
    const std::string name = target.text("name");
    const int64_t in = target.integer("in_features", 1, kMaxFeatures);
    const int64_t out = target.integer("out_features", 1, kMaxFeatures);
    if (!manifest->targets.emplace(name, std::make_pair(in, out)).second) {
      throw Error(EDGELORA_BAD_FILE, root.where("targets") + ": \"" + name + "\" is listed twice");
    }
  }
}

void read_files(const JsonFields& root, Manifest* manifest) {
  const JsonFields files = root.object("files");
  for (const auto& [relative, entry] : files.value().items()) {
    check_relative_path(relative, files.where("file"));
    const JsonFields file(entry, files.where(relative));
    const std::string sha256 = file.text("sha256");
    if (!is_hex64(sha256)) {
      throw Error(EDGELORA_BAD_FILE, file.where("sha256") + " is not 64 hex digits");
    }
    manifest->files[relative] = {file.integer("size", 0, kFileLimit), sha256};
  }
}

// A path that the index names must be among its files, so that it was checked with them.
void require_file(const Manifest& manifest, const std::string& relative, const std::string& where) {
  if (manifest.files.count(relative) != 0) return;
  throw Error(EDGELORA_BAD_FILE,
              where + ": \"" + relative + "\" is not among the bundle's files; export it again");
}

void read_adapters(const JsonFields& root, Manifest* manifest) {
  const JsonFields adapters = root.object("adapters");
  for (const auto& [name, entry] : adapters.value().items()) {
    const JsonFields adapter(entry, adapters.where(name));
    const std::string relative = adapter.text("path");
    require_file(*manifest, relative, adapters.where(name));
    manifest->adapters[name] = {relative, {}};
    if (entry.contains("invocation_tokens")) {
      manifest->adapters[name].invocation = adapter.tokens("invocation_tokens");
    }
    if (adapter.flag("selfcheck")) manifest->selfchecked.insert(name);
  }
}

// Sizes of all first: a missing weight file is said before anything is hashed.
void check_files(const Manifest& manifest) {
  std::set<std::string> adapters;
  for (const auto& [name, adapter] : manifest.adapters) adapters.insert(adapter.path);
  for (const auto& [relative, file] : manifest.files)
    check_bundle_file(manifest.folder, relative, file.size);
  for (const auto& [relative, file] : manifest.files) {
    if (adapters.count(relative) == 0) check_content(manifest, relative);
  }
}

}  // namespace

Manifest read_manifest(const std::string& folder) {
  const std::string path = folder + "/manifest.json";
  const std::string bytes = read_small_file(path, kManifestLimit);
  const Json json =
      parse_json_object(path, bytes.data(), bytes.data() + bytes.size(), kManifestDepth);
  const JsonFields root(json, path);
  check_format(root, path);
  check_digest(root, bytes, path);

  Manifest manifest;
  manifest.folder = folder;
  manifest.flavor = root.text("flavor");
  manifest.model = read_model(root.object("model"));
  manifest.base_fingerprint = read_fingerprint(root.object("base"));
  read_targets(root, &manifest);
  read_files(root, &manifest);
  read_adapters(root, &manifest);
  manifest.selfcheck = "selfcheck.json";
  if (root.value().contains("selfcheck")) {
    manifest.selfcheck = root.text("selfcheck");
    require_file(manifest, manifest.selfcheck, root.where("selfcheck"));
  }
  require_file(manifest, "model.onnx", path);
  check_files(manifest);
  return manifest;
}

void check_content(const Manifest& manifest, const std::string& relative) {
  const ManifestFile& file = manifest.files.at(relative);
  check_bundle_file(manifest.folder, relative, file.size);
  if (file.size <= kHashLimit) check_file_hash(manifest.path(relative), file.sha256);
}

}  // namespace edgelora
