#include "src/bundle_files.h"

#include <filesystem>
#include <fstream>
#include <system_error>
#include <vector>

#include "src/error.h"
#include "src/sha256.h"

namespace edgelora {
namespace {

namespace fs = std::filesystem;

constexpr size_t kReadAtOnce = size_t{64} << 10;  // bytes

[[noreturn]] void refuse(const std::string& message) { throw Error(EDGELORA_BAD_FILE, message); }

bool is_inside(const fs::path& path, const fs::path& folder) {
  auto part = path.begin();
  for (const fs::path& expected : folder) {
    if (part == path.end() || *part++ != expected) return false;
  }
  return true;
}

}  // namespace

std::string read_small_file(const std::string& path, int64_t limit) {
  std::error_code error;
  const uintmax_t size = fs::file_size(path, error);
  if (error)
    refuse(path + ": cannot be read (" + error.message() + "); is this the folder of a bundle?");
  if (size > static_cast<uintmax_t>(limit))
    refuse(path + ": " + std::to_string(size) + " bytes, too long");
  std::string bytes(static_cast<size_t>(size), '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(bytes.data(), static_cast<std::streamsize>(size)))
    refuse(path + ": cannot be read");
  return bytes;
}

void check_relative_path(const std::string& relative, const std::string& where) {
  const bool foreign = relative.find_first_of(std::string("\\:\0", 3)) != std::string::npos;
  size_t begin = 0;
  while (!foreign && begin <= relative.size()) {
    const size_t end = std::min(relative.find('/', begin), relative.size());
    const std::string part = relative.substr(begin, end - begin);
    if (part.empty() || part == "." || part == "..") break;
    if (end == relative.size()) return;
    begin = end + 1;
  }
  refuse(where + ": the path \"" + relative +
         "\" is not a plain path inside the bundle; do not load this bundle");
}

void check_bundle_file(const std::string& folder, const std::string& relative, int64_t size) {
  const std::string path = folder + "/" + relative;
  std::error_code error;
  const fs::path root = fs::canonical(folder, error);
  const fs::path file = error ? fs::path() : fs::canonical(path, error);
  if (error)
    refuse(path + ": the manifest lists it, but it is missing (" + error.message() +
           "); copy the bundle again");
  if (!is_inside(file, root))
    refuse(path + ": is a link out of the bundle; do not load this bundle");
  if (!fs::is_regular_file(file, error))
    refuse(path + ": is not a regular file; copy the bundle again");
  const uintmax_t found = fs::file_size(file, error);
  if (error || found != static_cast<uintmax_t>(size)) {
    refuse(path + ": has " + std::to_string(found) + " bytes, the manifest says " +
           std::to_string(size) + "; copy the bundle again");
  }
}

void check_file_hash(const std::string& path, const std::string& sha256) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> buffer(kReadAtOnce);
  Sha256 hash;
  while (file) {
    file.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    hash.update(buffer.data(), static_cast<size_t>(file.gcount()));
  }
  if (!file.eof()) refuse(path + ": cannot be read; copy the bundle again");
  if (hash.finish() != sha256)
    refuse(path + ": does not have the SHA-256 in the manifest: changed or damaged; " +
           "copy the bundle again");
}

}  // namespace edgelora
