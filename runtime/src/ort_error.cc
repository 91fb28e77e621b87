#include "src/ort_error.h"

#include <exception>
#include <memory>
#include <utility>

namespace edgelora {
namespace {

struct Phrase {
  const char* text;
  EdgeLoraStatus status;
};

constexpr Phrase kMarks[] = {
    {" [EDGELORA_INVALID_ARGUMENT]", EDGELORA_INVALID_ARGUMENT},
    {" [EDGELORA_BAD_FILE]", EDGELORA_BAD_FILE},
    {" [EDGELORA_NOT_FOUND]", EDGELORA_NOT_FOUND},
    {" [EDGELORA_RUNTIME]", EDGELORA_RUNTIME},
    {" [EDGELORA_OUT_OF_MEMORY]", EDGELORA_OUT_OF_MEMORY},
    {" [EDGELORA_INTERNAL]", EDGELORA_INTERNAL},
};

// What ONNX Runtime itself says without a code.
constexpr Phrase kAllocation[] = {
    {"bad_alloc", EDGELORA_OUT_OF_MEMORY},
    {"Failed to allocate memory", EDGELORA_OUT_OF_MEMORY},
};

const char* mark_of(EdgeLoraStatus status) {
  for (const Phrase& mark : kMarks) {
    if (mark.status == status) return mark.text;
  }
  return mark_of(EDGELORA_INTERNAL);
}

EdgeLoraStatus status_of(OrtErrorCode code, const std::string& message) {
  for (const Phrase& phrase : kAllocation) {
    if (message.find(phrase.text) != std::string::npos) return phrase.status;
  }
  switch (code) {
    case ORT_NO_SUCHFILE:
    case ORT_NO_MODEL:
    case ORT_INVALID_PROTOBUF:
    case ORT_INVALID_GRAPH:
      return EDGELORA_BAD_FILE;
    default:
      return EDGELORA_RUNTIME;
  }
}

Error from_ort(OrtErrorCode code, std::string message) {
  for (const Phrase& mark : kMarks) {
    const size_t at = message.find(mark.text);
    if (at == std::string::npos) continue;
    return {mark.status, message.erase(at, std::string(mark.text).size())};
  }
  const EdgeLoraStatus status = status_of(code, message);
  return {status, std::move(message)};
}

}  // namespace

OrtStatus* to_ort(const OrtApi& api, const Error& error) noexcept {
  const OrtErrorCode code =
      error.status() == EDGELORA_INVALID_ARGUMENT ? ORT_INVALID_ARGUMENT : ORT_FAIL;
  try {
    return api.CreateStatus(code, (std::string(error.what()) + mark_of(error.status())).c_str());
  } catch (const std::exception&) {  // no room for the message
    return api.CreateStatus(ORT_FAIL, kOutOfMemory);
  }
}

void check_ort(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::unique_ptr<OrtStatus, decltype(api.ReleaseStatus)> owned(status, api.ReleaseStatus);
  throw from_ort(api.GetErrorCode(status), api.GetErrorMessage(status));
}

}  // namespace edgelora
