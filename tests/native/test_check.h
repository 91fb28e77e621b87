// What the native tests share: a check that names its line, and a folder that goes away.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace edgelora::test {

inline std::atomic<int> failures{0};

inline void check(bool holds, const char* file, int line, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

#define CHECK(condition) edgelora::test::check((condition), __FILE__, __LINE__, #condition)

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "edgelora-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) std::perror("mkdtemp");
    path_ = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

}  // namespace edgelora::test
