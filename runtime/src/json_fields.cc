#include "src/json_fields.h"

#include <cmath>
#include <limits>
#include <utility>

#include "src/error.h"

namespace edgelora {
namespace {

[[noreturn]] void refuse(const std::string& where, const std::string& what) {
  throw Error(EDGELORA_BAD_FILE, where + " " + what + "; export the bundle again");
}

// Compares without conversion: an unsigned number beyond int64 is out of every range.
bool in_range(const JsonFields::Json& value, int64_t low, int64_t high) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    return number <= static_cast<uint64_t>(INT64_MAX) && static_cast<int64_t>(number) >= low &&
           static_cast<int64_t>(number) <= high;
  }
  const auto number = value.get<int64_t>();
  return number >= low && number <= high;
}

}  // namespace

JsonFields::JsonFields(const Json& object, std::string where)
    : object_(object), where_(std::move(where)) {
  if (!object.is_object()) refuse(where_, "is not an object");
}

const JsonFields::Json& JsonFields::at(const std::string& key) const {
  const auto found = object_.find(key);
  if (found == object_.end()) refuse(where(key), "is missing");
  return *found;
}

JsonFields JsonFields::object(const std::string& key) const { return {at(key), where(key)}; }

const JsonFields::Json& JsonFields::array(const std::string& key) const {
  const Json& value = at(key);
  if (!value.is_array()) refuse(where(key), "is not a list");
  return value;
}

std::string JsonFields::text(const std::string& key) const {
  const Json& value = at(key);
  if (!value.is_string()) refuse(where(key), "is not a string");
  return value.get<std::string>();
}

int64_t JsonFields::integer(const Json& value, const std::string& where, int64_t low,
                            int64_t high) {
  if (!value.is_number_integer()) refuse(where, "is not an integer");
  if (!in_range(value, low, high)) {
    refuse(where,
           "is " + value.dump() + ", not in " + std::to_string(low) + "…" + std::to_string(high));
  }
  return value.get<int64_t>();
}

int64_t JsonFields::integer(const std::string& key, int64_t low, int64_t high) const {
  return integer(at(key), where(key), low, high);
}

double JsonFields::number(const Json& value, const std::string& where) {
  if (!value.is_number() || !std::isfinite(value.get<double>())) {
    refuse(where, "is not a finite number");
  }
  return value.get<double>();
}

double JsonFields::number(const std::string& key) const { return number(at(key), where(key)); }

std::vector<int32_t> JsonFields::tokens(const std::string& key) const {
  std::vector<int32_t> tokens;
  for (const Json& token : array(key)) {
    const int64_t high = std::numeric_limits<int32_t>::max();
    tokens.push_back(static_cast<int32_t>(integer(token, where(key), 0, high)));
  }
  if (tokens.empty()) refuse(where(key), "is empty");
  return tokens;
}

bool JsonFields::flag(const std::string& key) const {
  const auto found = object_.find(key);
  if (found == object_.end()) return false;
  if (!found->is_boolean()) refuse(where(key), "is neither true nor false");
  return found->get<bool>();
}

}  // namespace edgelora
