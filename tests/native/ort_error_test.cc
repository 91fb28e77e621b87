// Statuses on their way through ONNX Runtime, which is played by four functions here.
#include <new>
#include <string>

#include "ops/ort.h"
#include "test_check.h"

struct OrtStatus {
  OrtErrorCode code;
  std::string message;
};

namespace edgelora::test {
namespace {

int statuses = 0;  // that nobody has released

OrtApi make_api() {
  OrtApi api{};
  api.CreateStatus = [](OrtErrorCode code, const char* message) noexcept {
    ++statuses;
    return new OrtStatus{code, message};
  };
  api.GetErrorCode = [](const OrtStatus* status) noexcept { return status->code; };
  api.GetErrorMessage = [](const OrtStatus* status) noexcept { return status->message.c_str(); };
  api.ReleaseStatus = [](OrtStatus* status) noexcept {
    --statuses;
    delete status;
  };
  return api;
}

const OrtApi api = make_api();

// Of a status that ONNX Runtime hands on with another code and words around it.
Error arrived(OrtStatus* status) {
  status->code = ORT_RUNTIME_EXCEPTION;
  status->message = "Exception: " + status->message + ", sorry";
  try {
    check_ort(api, status);
  } catch (const Error& error) {
    return error;
  }
  return {EDGELORA_OK, ""};
}

void test_a_status_of_ours_arrives() {
  for (const EdgeLoraStatus status :
       {EDGELORA_INVALID_ARGUMENT, EDGELORA_BAD_FILE, EDGELORA_NOT_FOUND, EDGELORA_RUNTIME,
        EDGELORA_OUT_OF_MEMORY, EDGELORA_INTERNAL}) {
    const Error error = arrived(ops::guarded(api, [&] { throw Error(status, "what is wrong"); }));
    CHECK(error.status() == status);
    CHECK(error.what() == std::string("Exception: what is wrong, sorry"));
  }
}

void test_missing_memory_arrives() {
  const Error error = arrived(ops::guarded(api, [] { throw std::bad_alloc(); }));
  CHECK(error.status() == EDGELORA_OUT_OF_MEMORY);
  CHECK(error.what() == std::string("Exception: out of memory, sorry"));
}

EdgeLoraStatus status_of(OrtErrorCode code, const char* message) {
  try {
    check_ort(api, api.CreateStatus(code, message));
  } catch (const Error& error) {
    CHECK(error.what() == std::string(message));
    return error.status();
  }
  return EDGELORA_OK;
}

void test_onnxruntimes_own_codes_become_ours() {
  CHECK(status_of(ORT_INVALID_PROTOBUF, "no model") == EDGELORA_BAD_FILE);
  CHECK(status_of(ORT_INVALID_GRAPH, "no graph") == EDGELORA_BAD_FILE);
  CHECK(status_of(ORT_FAIL, "something") == EDGELORA_RUNTIME);
  CHECK(status_of(ORT_RUNTIME_EXCEPTION, "std::bad_alloc") == EDGELORA_OUT_OF_MEMORY);
  CHECK(status_of(ORT_FAIL, "Failed to allocate memory for requested buffer of size 8") ==
        EDGELORA_OUT_OF_MEMORY);
  check_ort(api, nullptr);
  CHECK(ops::guarded(api, [] {}) == nullptr);
}

}  // namespace
}  // namespace edgelora::test

int main() {
  using namespace edgelora::test;
  test_a_status_of_ours_arrives();
  test_missing_memory_arrives();
  test_onnxruntimes_own_codes_become_ours();
  CHECK(statuses == 0);
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
