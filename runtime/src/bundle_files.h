// The files of a bundle on disk: reading a small one, and the checks that a listed one is there,
// inside and whole.
#pragma once

#include <cstdint>
#include <string>

namespace edgelora {

// The whole file; throws Error when it is missing, unreadable or longer than `limit` bytes.
std::string read_small_file(const std::string& path, int64_t limit);

// Throws unless `relative` is a clean relative path with forward slashes: no empty, "." or ".."
// part, no backslash, no colon.
void check_relative_path(const std::string& relative, const std::string& where);

// Throws unless folder/relative is a regular file of `size` bytes that, symbolic links resolved,
// lies inside the folder.
void check_bundle_file(const std::string& folder, const std::string& relative, int64_t size);

// Throws unless the file's SHA-256 is these 64 hex digits. Reads all of it.
void check_file_hash(const std::string& path, const std::string& sha256);

}  // namespace edgelora
