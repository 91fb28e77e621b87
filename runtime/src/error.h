// The error that crosses our own C++; the C API turns it into a status and a message.
#pragma once

#include <stdexcept>
#include <string>

#include "edgelora.h"

namespace edgelora {

class Error : public std::runtime_error {
 public:
  Error(EdgeLoraStatus status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  EdgeLoraStatus status() const { return status_; }

 private:
  EdgeLoraStatus status_;
};

}  // namespace edgelora
