// The adapter store: good files, every way a file can be wrong, weights, unloading, threads.
#include "src/adapter_store.h"

#include <atomic>
#include <cmath>
#include <functional>
#include <thread>

#include "adapter_bytes.h"
#include "src/adapter_file.h"
#include "src/error.h"
#include "test_check.h"

namespace edgelora::test {
namespace {

const Targets kTargets{{"up", {3, 20}}, {"down", {20, 3}}};
constexpr int64_t kRank = 2;
constexpr PrefixShape kPrefix{2, 1, 3};

std::vector<float> counting(int64_t count) {
  std::vector<float> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<float>(i + 1));
  return values;
}

AdapterBytes good() {
  AdapterBytes file;
  file.target("up", kRank, counting(kRank * 3), counting(20 * kRank), 0.5);
  return file;
}

// The message of the Error that `action` throws, "" if none.
std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

int64_t load(const std::string& path) {
  return AdapterStore::instance().load(path, kBase, kTargets, kPrefix);
}

std::vector<WeightedBranch> branches_of(int64_t handle, const std::string& target) {
  std::vector<WeightedBranch> branches;
  AdapterStore::branches(*AdapterStore::instance().find(handle), target, &branches);
  return branches;
}

void test_a_good_file_gives_its_factors(const TemporaryFolder& folder) {
  write_file(folder.file("good"), good().bytes());
  const int64_t handle = load(folder.file("good"));
  CHECK(handle >= 1);
  CHECK(load(folder.file("good")) > handle);
  const auto branches = branches_of(handle, "up");
  CHECK(branches.size() == 1 && branches[0].weight == 0.5F);
  CHECK(branches_of(handle, "down").empty());
  const kernels::Factors& factors = branches[0].branch->factors;
  float first_of_row_17 =
      0;  // [1, 0, 1]: panel 1, column 0, row 17; counting puts 17 · 2 + 1 there
  std::memcpy(&first_of_row_17, static_cast<const char*>(factors.b) + 4 * (1 * kRank * 16 + 1), 4);
  CHECK(!factors.half && factors.rank == kRank && first_of_row_17 == 35.0F);
}

struct Wrong {
  const char* message;  // a part of it
  std::function<void(AdapterBytes&)> change;
};

Json& shape(AdapterBytes& file, const char* name) { return file.header[name]["shape"]; }

const Wrong kWrong[] = {
    {"not an EdgeLoRA adapter", [](auto& f) { f.metadata()["format"] = "peft"; }},
    {"not an EdgeLoRA adapter", [](auto& f) { f.header.erase("__metadata__"); }},
    {"format_version is 2", [](auto& f) { f.metadata()["format_version"] = "2"; }},
    {"no name", [](auto& f) { f.metadata().erase("name"); }},
    {"is no string", [](auto& f) { f.metadata()["name"] = 7; }},
    {"__metadata__ is no object", [](auto& f) { f.metadata() = Json::array({f.metadata()}); }},
    {"not an EdgeLoRA adapter", [](auto& f) { f.metadata() = Json::object(); }},
    {"made for the base sha256:b", [](auto& f) { f.metadata()["base_fingerprint"] = "sha256:b"; }},
    {"no base_fingerprint", [](auto& f) { f.metadata().erase("base_fingerprint"); }},
    {"no scaling", [](auto& f) { f.metadata().erase("scaling"); }},
    {"not valid JSON", [](auto& f) { f.metadata()["scaling"] = "{\"up\": NaN}"; }},
    {"not a finite number", [](auto& f) { f.metadata()["scaling"] = "{\"up\": 1e39}"; }},
    {"not a finite number", [](auto& f) { f.metadata()["scaling"] = "{\"up\": \"1\"}"; }},
    {"key \"up\" twice", [](auto& f) { f.metadata()["scaling"] = "{\"up\": 1, \"up\": 2}"; }},
    {"nested too deeply", [](auto& f) { f.metadata()["scaling"] = "{\"up\": [1]}"; }},
    {"no targets", [](auto& f) { f.metadata()["scaling"] = "{}"; }},
    {"no linear gate, side", [](auto& f) { f.metadata()["scaling"] = "{\"side\":1,\"gate\":1}"; }},
    {"down.lora_a is missing", [](auto& f) { f.metadata()["scaling"] = "{\"up\":1,\"down\":1}"; }},
    {"factor of no target", [](auto& f) { f.tensor("extra", {1}, {1}); }},
    {"factor of no target", [](auto& f) { f.tensor("down.row_factor", {1}, {1}); }},
    {"up.row_factor is F32 [1], expected F32 [20]",
     [](auto& f) {
       f.tensor("up.row_factor", {1}, {1});
     }},
    {"up.row_factor is F32 [20, 1], expected F32 [20]",
     [](auto& f) {
       f.tensor("up.row_factor", {20, 1}, counting(20));
     }},
    {"up.row_factor is I32",
     [](auto& f) {
       f.tensor("up.row_factor", {20}, counting(20));
       f.header["up.row_factor"]["dtype"] = "I32";
     }},
    {"up.row_factor holds NaN",
     [](auto& f) {
       f.tensor("up.row_factor", {20}, std::vector<float>(20, NAN));
     }},
    {"factor of no target", [](auto& f) { f.tensor("down.bias", {3}, {1, 2, 3}); }},
    {"up.bias is F32 [3], expected F32 [20]",
     [](auto& f) {
       f.tensor("up.bias", {3}, {1, 2, 3});
     }},
    {"up.bias holds NaN",
     [](auto& f) {
       f.tensor("up.bias", {20}, std::vector<float>(20, INFINITY));
     }},
    {"down.lora_b is missing",
     [](auto& f) {
       f.tensor("down.bias", {3}, {1, 2, 3});
       f.tensor("down.lora_a", {1, 20}, counting(20));
       f.scaling("down", 1);
     }},
    {"down.lora_a is missing",
     [](auto& f) {
       f.tensor("down.row_factor", {3}, {1, 2, 3});
       f.tensor("down.lora_b", {1, 1, 16}, counting(16));
       f.scaling("down", 1);
     }},
    {"factor of no target",
     [](auto& f) {
       f.tensor("down.lora_a", {1, 20}, counting(20));
     }},
    {"up.lora_b is missing", [](auto& f) { f.header.erase("up.lora_b"), f.data.resize(24); }},
    {"up.lora_a is I32", [](auto& f) { f.header["up.lora_a"]["dtype"] = "I32"; }},
    {"another number of bytes", [](auto& f) { f.header["up.lora_a"]["dtype"] = "F16"; }},
    {"lora_a is [6], expected [6, 3]", [](auto& f) { shape(f, "up.lora_a") = {6}; }},
    {"expected [3, 3]",
     [](auto& f) {
       shape(f, "up.lora_a") = {3, 2};
     }},
    {"expected [2, 2, 16]",
     [](auto& f) {
       shape(f, "up.lora_b") = {1, 4, 16};
     }},
    {"another number of bytes",
     [](auto& f) {
       shape(f, "up.lora_a") = {2, 4};
     }},
    {"too large",
     [](auto& f) {
       shape(f, "up.lora_a") = {int64_t{1} << 32, int64_t{1} << 32};
     }},
    {"no integer in range",
     [](auto& f) {
       shape(f, "up.lora_a") = {-2, -3};
     }},
    {"no integer in range",
     [](auto& f) {
       shape(f, "up.lora_a") = {2, 3.5};
     }},
    {"no integer in range",
     [](auto& f) {
       shape(f, "up.lora_a") = {2, UINT64_MAX};
     }},
    {"no valid shape", [](auto& f) { shape(f, "up.lora_a") = "2x3"; }},
    {"no tensor entry", [](auto& f) { f.header["up.lora_a"].erase("dtype"); }},
    {"no tensor entry", [](auto& f) { f.header["up.lora_a"] = 1; }},
    {"no two data_offsets",
     [](auto& f) {
       f.header["up.lora_a"]["data_offsets"] = {0, 24, 48};
     }},
    {"lies outside",
     [](auto& f) {
       f.header["up.lora_a"]["data_offsets"] = {24, 0};
     }},
    {"lies outside",
     [](auto& f) {
       f.header["up.lora_a"]["data_offsets"] = {0, INT64_MAX};
     }},
    {"lies outside the file", [](auto& f) { f.data.pop_back(); }},
    {"overlap or leave a gap",
     [](auto& f) {
       f.header["up.lora_a"]["data_offsets"] = {24, 48};
     }},
    {"bytes follow", [](auto& f) { f.data += "x"; }},
    {"nested too deeply", [](auto& f) { shape(f, "up.lora_a") = {{1}}; }},
};

void test_wrong_files_are_refused_with_one_line(const TemporaryFolder& folder) {
  const std::string path = folder.file("wrong");
  for (const Wrong& wrong : kWrong) {
    AdapterBytes file = good();
    wrong.change(file);
    write_file(path, file.bytes());
    const std::string message = message_of([&] { load(path); });
    const bool told = message.find(wrong.message) != std::string::npos &&
                      message.rfind(path, 0) == 0 && message.find('\n') == std::string::npos;
    check(told, __FILE__, __LINE__, std::string(wrong.message) + " ← \"" + message + "\"");
  }
}

// What follows the metadata is not read for it: it may be damaged.
void test_another_base_is_refused_by_the_metadata_alone(const TemporaryFolder& folder) {
  const std::string path = folder.file("other"), other = "sha256:" + std::string(64, 'b');
  const std::string metadata = good().metadata().dump();
  std::string theirs = metadata;
  theirs.replace(theirs.find(kBase), kBase.size(), other);
  const auto refusal = [&](const std::string& header) {
    write_file(path, AdapterBytes::with_header(header, ""));
    return message_of([&] { load(path); });
  };
  const auto tells = [](const std::string& message, const char* what) {
    return message.find(what) != std::string::npos;
  };
  for (const std::string rest : {"", ",", ",\"up.lora_a\":{\"dtype\"", ",\"x\":[[[[[[1]]]]]]}"}) {
    CHECK(tells(refusal("{\"__metadata__\":" + theirs + rest), "made for the base sha256:b"));
    CHECK(tells(refusal("{\"__metadata__\":" + metadata + rest),
                rest.find("[[") == rest.npos ? "not valid JSON" : "nested too deeply"));
  }
  const std::string later = "{\"x\":{\"__metadata__\":1},\"__metadata__\":";
  CHECK(tells(refusal(later + theirs + "}"), "made for the base sha256:b"));
  CHECK(tells(refusal(later + metadata + "}"), "x is no tensor entry"));
  const std::string twice = "{\"__metadata__\":" + metadata + ",\"__metadata__\":" + theirs + "}";
  CHECK(tells(refusal(twice), "key \"__metadata__\" twice"));
}

void test_rank_zero_is_refused(const TemporaryFolder& folder) {
  AdapterBytes file;
  file.tensor("up.lora_a", {0, 3}, {});
  file.tensor("up.lora_b", {2, 0, 16}, {});
  file.metadata()["scaling"] = "{\"up\": 1}";
  write_file(folder.file("zero"), file.bytes());
  CHECK(message_of([&] { load(folder.file("zero")); }).find("rank must be") != std::string::npos);
}

void test_values_that_are_not_finite_are_refused(const TemporaryFolder& folder) {
  for (const float value : {std::nanf(""), -INFINITY}) {
    AdapterBytes file;
    std::vector<float> a = counting(kRank * 3);
    a[4] = value;
    file.target("up", kRank, a, counting(20 * kRank), 1);
    write_file(folder.file("nan"), file.bytes());
    CHECK(message_of([&] { load(folder.file("nan")); }).find("NaN or infinity") !=
          std::string::npos);
  }
}

void test_values_in_padding_rows_are_refused(const TemporaryFolder& folder) {
  AdapterBytes file = good();
  const float value = 1;
  std::memcpy(&file.data[file.data.size() - 4], &value, 4);
  write_file(folder.file("padding"), file.bytes());
  CHECK(message_of([&] { load(folder.file("padding")); }).find("padding rows") !=
        std::string::npos);
}

void test_bytes_that_are_no_safetensors_are_refused(const TemporaryFolder& folder) {
  const std::string whole = good().bytes();
  const std::string path = folder.file("bytes");
  for (size_t size = 0; size < whole.size(); ++size) {  // every truncation
    write_file(path, whole.substr(0, size));
    CHECK(!message_of([&] { load(path); }).empty());
  }
  const std::string deep = std::string(100000, '[');
  for (const std::string& text : {std::string("{"), std::string("[]"), deep, std::string("\xff")}) {
    write_file(path, AdapterBytes::with_header(text, ""));
    CHECK(!message_of([&] { load(path); }).empty());
  }
  write_file(path, std::string(8, '\xff') + whole);
  CHECK(message_of([&] { load(path); }).find("longer than the file") != std::string::npos);
  CHECK(message_of([&] { load(folder.file("none")); }).find("cannot be read") != std::string::npos);
  CHECK(!message_of([&] { load(folder.file("")); }).empty());
}

void test_compose_sums_weights(const TemporaryFolder& folder) {
  AdapterStore& store = AdapterStore::instance();
  write_file(folder.file("a"), good().bytes());
  const int64_t parts[] = {load(folder.file("a")), load(folder.file("a"))};
  const float weights[] = {2, -3};
  const int64_t sum = store.compose(parts, weights, 2);
  const int64_t nested[] = {sum, parts[0]};
  const float again[] = {0.5, 1};
  const int64_t total = store.compose(nested, again, 2);  // (0.5 · 2 + 1) · a − 0.5 · 3 · b
  for (const int64_t part : parts) store.unload(part);
  store.unload(sum);
  const auto branches = branches_of(total, "up");
  CHECK(branches.size() == 2 && branches[0].weight == 1.0F && branches[1].weight == -0.75F);
}

void test_compose_sums_rows(const TemporaryFolder& folder) {
  AdapterBytes file = good();
  file.tensor("up.row_factor", {20}, counting(20));
  file.tensor("up.bias", {20}, counting(20));
  file.tensor("down.bias", {3}, {1, 2, 3});
  file.scaling("down", 1);
  write_file(folder.file("a"), file.bytes());
  write_file(folder.file("b"), good().bytes());
  AdapterStore& store = AdapterStore::instance();
  const int64_t parts[] = {load(folder.file("a")), load(folder.file("b"))};
  CHECK(store.find(parts[0])->rows.at("up").factors == counting(20));
  CHECK(store.find(parts[0])->rows.at("up").bias == counting(20));
  CHECK(branches_of(parts[0], "down").empty());
  CHECK(store.find(parts[1])->rows.empty());
  const float weights[] = {0.5, 4};
  const auto sum = store.find(store.compose(parts, weights, 2));
  CHECK(sum->rows.at("up").factors[2] == 2.0F && sum->rows.at("up").bias[2] == 1.5F);
  CHECK(sum->rows.at("down").factors.empty());
  CHECK(sum->rows.at("down").bias == (std::vector<float>{0.5, 1, 1.5}));
}

void test_compose_refuses_weights_that_overflow(const TemporaryFolder& folder) {
  AdapterStore& store = AdapterStore::instance();
  AdapterBytes file = good();
  file.scaling("up", 1e10);
  write_file(folder.file("scaled"), file.bytes());
  file = good();
  file.tensor("up.bias", {20}, std::vector<float>(20, 1e10F));
  write_file(folder.file("biased"), file.bytes());
  write_file(folder.file("plain"), good().bytes());
  const auto message = [&](const char* name, float weight) {
    const int64_t handle = load(folder.file(name));
    return message_of([&] { store.compose(&handle, &weight, 1); });
  };
  CHECK(message("scaled", 1e30F).find("up: the weight of an adapter times its scaling") == 0);
  CHECK(message("biased", 1e30F).find("up: a bias is not a finite number") == 0);
  CHECK(message("plain", NAN).find("the weight of an adapter is not a finite number") == 0);
  CHECK(message("plain", 1e30F).empty());
  const int64_t twice[] = {load(folder.file("plain")), 0};
  const float large[] = {3e38F};
  const int64_t half[] = {store.compose(twice, large, 1), twice[0]};
  const float more[] = {1, 3e38F};
  CHECK(message_of([&] { store.compose(half, more, 2); }).find("not a finite number") !=
        std::string::npos);
}

void test_compose_refuses_what_it_cannot_sum(const TemporaryFolder& folder) {
  AdapterStore& store = AdapterStore::instance();
  write_file(folder.file("a"), good().bytes());
  AdapterBytes other = good();
  other.metadata()["base_fingerprint"] = "other";
  write_file(folder.file("b"), other.bytes());
  const int64_t parts[] = {load(folder.file("a")),
                           store.load(folder.file("b"), "other", kTargets, kPrefix)};
  const float weights[] = {1, 1};
  const float infinite[] = {INFINITY};
  const int64_t base[] = {0};
  CHECK(message_of([&] { store.compose(parts, weights, 2); }).find("different bases") !=
        std::string::npos);
  CHECK(message_of([&] { store.compose(parts, infinite, 1); }).find("finite") != std::string::npos);
  CHECK(message_of([&] { store.compose(base, weights, 1); }) == "adapter handle 0 is not loaded");
  CHECK(message_of([&] { store.compose(base, weights, 0); }).find("no adapters") !=
        std::string::npos);
}

AdapterBytes good_prefix() {
  AdapterBytes file;
  file.tensor("prefix.keys", {2, 1, 4, 3}, counting(24));
  file.tensor("prefix.values", {2, 1, 4, 3}, std::vector<float>(24, 0.5F));
  return file;
}

void test_a_prefix_gives_its_keys_and_values(const TemporaryFolder& folder) {
  write_file(folder.file("prefix"), good_prefix().bytes());
  const int64_t handle = load(folder.file("prefix"));
  auto prefix = AdapterStore::instance().find(handle)->prefix();
  float row[3];
  prefix->read(prefix->keys, 1, 0, 2, row);
  CHECK(prefix->positions == 4 && row[0] == 19.0F && row[2] == 21.0F);
  AdapterStore::instance().unload(handle);
  prefix->read(prefix->values, 1, 0, 3, row);  // still mapped
  CHECK(row[2] == 0.5F);
  write_file(folder.file("a"), good().bytes());
  CHECK(AdapterStore::instance().find(load(folder.file("a")))->prefix() == nullptr);
}

void test_wrong_prefixes_are_refused_with_one_line(const TemporaryFolder& folder) {
  const auto refused = [&](const std::function<void(AdapterBytes*)>& change) {
    AdapterBytes file = good_prefix();
    change(&file);
    write_file(folder.file("wrong"), file.bytes());
    return message_of([&] { load(folder.file("wrong")); });
  };
  const auto reshaped = [&](const std::vector<int64_t>& shape) {
    return refused([&](AdapterBytes* file) { file->header["prefix.values"]["shape"] = shape; });
  };
  CHECK(refused([](AdapterBytes*) {}).empty());
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{2, 1, 12},
                                            {1, 2, 4, 3},
                                            {2, 2, 2, 3},
                                            {2, 1, 3, 4},
                                            {2, 1, 4, 3, 1}}) {
    CHECK(reshaped(shape).find("prefix.values is [") != std::string::npos);
  }
  CHECK(refused([](AdapterBytes* file) {
          file->tensor("up.bias", {20}, counting(20));
        }).find("up.bias is a factor of no target") != std::string::npos);
  CHECK(refused([](AdapterBytes* file) {
          file->tensor("up.bias", {20}, counting(20));
          file->scaling("up", 1);
        }).find("a prefix and targets") != std::string::npos);
  AdapterBytes half;
  half.tensor("prefix.keys", {2, 1, 4, 3}, counting(24));
  write_file(folder.file("wrong"), half.bytes());
  CHECK(message_of([&] { load(folder.file("wrong")); }).find("prefix.values is missing") !=
        std::string::npos);
  AdapterBytes empty;
  empty.tensor("prefix.keys", {2, 1, 0, 3}, {});
  empty.tensor("prefix.values", {2, 1, 0, 3}, {});
  write_file(folder.file("wrong"), empty.bytes());
  CHECK(message_of([&] { load(folder.file("wrong")); }).find("prefix.keys is [2, 1, 0, 3]") !=
        std::string::npos);
  std::vector<float> values = counting(24);
  values[7] = NAN;
  AdapterBytes nan;
  nan.tensor("prefix.keys", {2, 1, 4, 3}, counting(24));
  nan.tensor("prefix.values", {2, 1, 4, 3}, values);
  write_file(folder.file("wrong"), nan.bytes());
  CHECK(message_of([&] { load(folder.file("wrong")); }).find("prefix.values holds NaN") !=
        std::string::npos);
}

void test_a_prefix_is_neither_weighted_nor_added(const TemporaryFolder& folder) {
  AdapterStore& store = AdapterStore::instance();
  write_file(folder.file("prefix"), good_prefix().bytes());
  write_file(folder.file("a"), good().bytes());
  const int64_t handles[] = {load(folder.file("a")), load(folder.file("prefix"))};
  const float ones[] = {1, 1};
  const float half[] = {0.5F};
  const auto refused = [&](const int64_t* parts, const float* weights, int64_t count) {
    const auto text = message_of([&] { store.compose(parts, weights, count); });
    return text.find("a prefix of the text cannot be weighted or added") != std::string::npos;
  };
  CHECK(refused(handles, ones, 2));
  CHECK(refused(handles + 1, half, 1));
  CHECK(store.find(store.compose(handles + 1, ones, 1))->prefix() ==
        store.find(handles[1])->prefix());
}

void test_an_unloaded_adapter_lives_only_as_long_as_it_is_held(const TemporaryFolder& folder) {
  AdapterStore& store = AdapterStore::instance();
  write_file(folder.file("a"), good().bytes());
  const int64_t handle = load(folder.file("a"));
  auto held = store.find(handle);
  const std::weak_ptr<const AdapterFile> file = held->terms[0].file;
  store.unload(handle);
  CHECK(store.find(handle) == nullptr && store.resolve(handle) == held);
  held.reset();
  CHECK(store.resolve(handle) == nullptr && file.expired());
  CHECK(message_of([&] { store.unload(handle); }).find("is not loaded") != std::string::npos);
  CHECK(store.find(0) == nullptr && store.find(-1) == nullptr);
}

void test_threads_find_and_unload_at_once(const TemporaryFolder& folder) {
  AdapterStore& store = AdapterStore::instance();
  write_file(folder.file("a"), good().bytes());
  std::atomic<int64_t> latest{load(folder.file("a"))};
  std::atomic<bool> done{false};
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      while (!done) {
        const auto found = store.resolve(latest);
        if (!found) continue;
        std::vector<WeightedBranch> branches;
        AdapterStore::branches(*found, "up", &branches);
        const auto* bytes = static_cast<const unsigned char*>(branches[0].branch->factors.b);
        CHECK(bytes[3] == 0x3f);  // 1.0F: the memory is still mapped
      }
    });
  }
  for (int i = 0; i < 300; ++i) {
    const int64_t old = latest.exchange(load(folder.file("a")));
    store.unload(old);
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
}

}  // namespace
}  // namespace edgelora::test

int main() {
  using namespace edgelora::test;
  const TemporaryFolder folder;
  test_a_good_file_gives_its_factors(folder);
  test_wrong_files_are_refused_with_one_line(folder);
  test_another_base_is_refused_by_the_metadata_alone(folder);
  test_rank_zero_is_refused(folder);
  test_values_that_are_not_finite_are_refused(folder);
  test_values_in_padding_rows_are_refused(folder);
  test_bytes_that_are_no_safetensors_are_refused(folder);
  test_compose_sums_weights(folder);
  test_compose_sums_rows(folder);
  test_compose_refuses_weights_that_overflow(folder);
  test_compose_refuses_what_it_cannot_sum(folder);
  test_a_prefix_gives_its_keys_and_values(folder);
  test_wrong_prefixes_are_refused_with_one_line(folder);
  test_a_prefix_is_neither_weighted_nor_added(folder);
  test_an_unloaded_adapter_lives_only_as_long_as_it_is_held(folder);
  test_threads_find_and_unload_at_once(folder);
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
