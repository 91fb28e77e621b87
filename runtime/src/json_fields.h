// Typed access to the fields of a JSON object; whatever is missing or of the wrong kind is an Error
// that names it.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace edgelora {

class JsonFields {
 public:
  using Json = nlohmann::json;

  // `where` leads every message: the file, then the path of keys to `object`.
  JsonFields(const Json& object, std::string where);

  const Json& at(const std::string& key) const;
  JsonFields object(const std::string& key) const;
  const Json& array(const std::string& key) const;
  std::string text(const std::string& key) const;

  // An integer in low…high.
  int64_t integer(const std::string& key, int64_t low, int64_t high) const;

  // The same for a value that is not a member of an object.
  static int64_t integer(const Json& value, const std::string& where, int64_t low, int64_t high);

  // At least one token id.
  std::vector<int32_t> tokens(const std::string& key) const;

  // A finite number.
  double number(const std::string& key) const;
  static double number(const Json& value, const std::string& where);

  // true or false; false if it is not there.
  bool flag(const std::string& key) const;

  // The members of the object itself.
  const Json& value() const { return object_; }
  std::string where(const std::string& key) const { return where_ + ": " + key; }

 private:
  const Json& object_;
  std::string where_;
};

}  // namespace edgelora
