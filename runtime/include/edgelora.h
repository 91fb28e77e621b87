/* EdgeLoRA runtime, C API.
 *
 * A model is a loaded bundle, shared and immutable. A session is one sequence: its kv_cache,
 * position and active adapter. The API speaks token ids; text, stop strings and chat templates
 * belong to the caller.
 *
 * Ownership: what a `_create`, `_load` function returns belongs to the caller, who releases it with
 * the matching `_free` (adapters: `_unload`). Pointers passed in are only read during the call
 * unless said otherwise.
 *
 * Errors: every function that can fail returns a status; on any other than EDGELORA_OK,
 * edgelora_last_error() is a one-line message of the calling thread. Out-parameters are written
 * only on success (arrays: their contents are undefined after a failure).
 *
 * Threads: functions on a model and on adapters may be called from any thread at any time. A
 * session is used by one thread at a time; only edgelora_session_cancel may be called beside it.
 * Several sessions of one model may run at once.
 *
 * Processes: after a fork the child lacks the threads of models loaded before it. Their prefill,
 * logits and generate are refused there with EDGELORA_INVALID_ARGUMENT; the child loads the model
 * itself. No call into this library may run while another thread forks.
 *
 * Versioning: structs begin with their size, set by their `_init` function or by the caller to
 * sizeof; a size that the library does not know is refused.
 */
#ifndef EDGELORA_H_
#define EDGELORA_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EDGELORA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct EdgeLoraModel EdgeLoraModel;
typedef struct EdgeLoraSession EdgeLoraSession;

typedef enum EdgeLoraStatus {
  EDGELORA_OK = 0,
  EDGELORA_INVALID_ARGUMENT = 1, /* null pointer, token id or option out of range, empty prompt,
                                    session in a call */
  EDGELORA_BAD_FILE = 2,         /* missing, damaged, of a newer format, or for another base */
  EDGELORA_NOT_FOUND = 3,        /* unknown adapter name or handle */
  EDGELORA_CONTEXT_FULL = 4,     /* the kv_cache holds no more positions */
  EDGELORA_RUNTIME = 5,          /* onnxruntime is missing, too old, or reported an error; the
                                    system gave no threads */
  EDGELORA_CANCELLED = 6,        /* edgelora_session_cancel was called */
  EDGELORA_OUT_OF_MEMORY = 7,
  EDGELORA_INTERNAL = 8,
  EDGELORA_SELFCHECK_FAILED = 9  /* the model computes other logits than its bundle expects */
} EdgeLoraStatus;

/* Handle of an adapter; 0 is the base. Handles are never reused. */
typedef int64_t EdgeLoraAdapter;

/* "major.minor.patch" of the library; static storage. */
EDGELORA_API const char* edgelora_version(void);

/* Message of this thread's last failed call, "" if none; valid until this thread's next call. */
EDGELORA_API const char* edgelora_last_error(void);

/* ---- model ---- */

typedef struct EdgeLoraModelOptions {
  size_t size;                  /* sizeof(EdgeLoraModelOptions) */
  const char* onnxruntime_path; /* NULL: the system's "libonnxruntime.so" by name */
  /* 0: one for each performance core; at most 64, or 4 for each CPU if that is more. */
  int32_t threads;
  /* Workers spin between operators: faster, but takes the cores. Not done with more threads than
   * CPUs. Default true. */
  bool spinning;
  /* float32 activations instead of int8: slow, for checks; not in flavor ort. Default false. */
  bool exact;
} EdgeLoraModelOptions;

EDGELORA_API void edgelora_model_options_init(EdgeLoraModelOptions* options);

/* Loads the bundle folder: checks structure, sizes and the SHA-256 of all but large files and
 * adapters, maps the weights. options may be NULL. */
EDGELORA_API EdgeLoraStatus edgelora_model_load(const char* bundle,
                                                const EdgeLoraModelOptions* options,
                                                EdgeLoraModel** model);

/* Sessions of it may still be in use: what they share is released with the last of them. NULL is
 * allowed. */
EDGELORA_API void edgelora_model_free(EdgeLoraModel* model);

typedef struct EdgeLoraModelInfo {
  size_t size; /* set by the caller to sizeof(EdgeLoraModelInfo) */
  int32_t vocab_size;
  int32_t context_length; /* largest number of positions of a session */
  int32_t num_hidden_layers;
  int32_t threads;
  int64_t weight_bytes;   /* of the external weight file */
  int64_t kv_cache_bytes; /* for one position of one session */
  int32_t eos_token_count;
  const int32_t* eos_token_ids; /* lives as long as the model; may be NULL if there are none */
  const char* isa;              /* kernels in use, "onnxruntime" in flavor ort; static storage */
  int32_t adapter_count;
  /* Of the bundle, sorted, UTF-8; lives as long as the model; may be NULL if there are none. */
  const char* const* adapter_names;
} EdgeLoraModelInfo;

EDGELORA_API EdgeLoraStatus edgelora_model_info(const EdgeLoraModel* model,
                                                EdgeLoraModelInfo* info);

/* What a self-check found of the base or of one adapter. */
typedef struct EdgeLoraSelfcheck {
  size_t size;         /* sizeof(EdgeLoraSelfcheck) */
  const char* adapter; /* UTF-8, NULL: the base; lives as long as the callback's call */
  bool exact;          /* computed with float32 activations, else as the model does */
  bool checked;        /* false: nothing is known of it (added by an older EdgeLoRA) */
  int32_t logits;      /* that were compared */
  double error;        /* root mean square of their differences from the expected ones */
  double tolerance;    /* that this may have */
} EdgeLoraSelfcheck;

/* Called on the checking thread; may call whatever takes a model, a session or an adapter, and must
 * return: neither a C++ exception nor longjmp may leave it. */
typedef void (*EdgeLoraSelfcheckCallback)(const EdgeLoraSelfcheck* result, void* user_data);

/* Computes the prompts of the bundle's selfcheck.json with the base, then with each adapter of the
 * bundle, and compares their greatest logits with those computed at export: first with float32
 * activations, for which the bundle is loaded once more until the call ends (not in flavor ort, nor
 * if the model is exact itself) and which shows any change of weights or factors; then with the
 * model as it is, within the error of int8. Sessions of the model may run meanwhile. callback (may
 * be NULL) gets each result, of the first that fails too, with which the check ends.
 * EDGELORA_SELFCHECK_FAILED: the message names the adapter and the logit that is farthest off.
 * EDGELORA_NOT_FOUND: the bundle has no selfcheck.json. */
EDGELORA_API EdgeLoraStatus edgelora_model_selfcheck(const EdgeLoraModel* model,
                                                     EdgeLoraSelfcheckCallback callback,
                                                     void* user_data);

/* ---- adapters ---- */

/* Loads the bundle's adapter `name` and returns a handle with one reference. Loading a name again
 * gives a new handle. */
EDGELORA_API EdgeLoraStatus edgelora_adapter_load(EdgeLoraModel* model, const char* name,
                                                  EdgeLoraAdapter* adapter);

/* The same from a file adapter.safetensors outside the bundle; refused unless it names this base's
 * fingerprint. Bundles of flavor ort take their own adapters only. */
EDGELORA_API EdgeLoraStatus edgelora_adapter_load_file(EdgeLoraModel* model, const char* path,
                                                       EdgeLoraAdapter* adapter);

/* Σ weights[i]·adapters[i] as a new handle; the parts may be unloaded afterwards. Those of flavor
 * ort, and those that are a prefix: one, with weight 1. */
EDGELORA_API EdgeLoraStatus edgelora_adapter_compose(const EdgeLoraAdapter* adapters,
                                                     const float* weights, size_t count,
                                                     EdgeLoraAdapter* adapter);

/* Drops the reference. A running prefill, logits or generate finishes with it; later calls of
 * sessions that still name it fail with EDGELORA_NOT_FOUND. */
EDGELORA_API EdgeLoraStatus edgelora_adapter_unload(EdgeLoraAdapter adapter);

/* ---- session ---- */

typedef struct EdgeLoraSessionOptions {
  size_t size;
  /* Positions of the kv_cache; 0: the model's context_length. Memory is touched only as positions
   * are used. */
  int32_t context_length;
  /* Activated LoRA acts on every position, as if its invocation tokens stood before the first: to
   * measure it on any text. */
  bool invoked;
} EdgeLoraSessionOptions;

EDGELORA_API void edgelora_session_options_init(EdgeLoraSessionOptions* options);
EDGELORA_API EdgeLoraStatus edgelora_session_create(EdgeLoraModel* model,
                                                    const EdgeLoraSessionOptions* options,
                                                    EdgeLoraSession** session);

/* NULL is allowed. */
EDGELORA_API void edgelora_session_free(EdgeLoraSession* session);

/* Adapter of the next positions. If it differs from the one that computed the last position in the
 * kv_cache, the positions from the first that is another's on are computed anew with it before the
 * next step, unless keep_cache. Setting the former one again before any step undoes that. An
 * adapter of another base, or of a model of another flavor, is refused.
 *
 * Activated LoRA (PEFT's alora_invocation_tokens) acts from the first of its invocation tokens on,
 * where they occur last in the session's text as it is when prefill, logits or generate begins; not
 * at all without them. Positions before are the base's (of a sum: its other adapters'): what the
 * kv_cache has of them stays.
 *
 * An adapter may be a prefix (prefix tuning, prompt tuning, p-tuning): the kv_cache then begins
 * with its keys and values, which count against context_length; a change to or from it moves the
 * text, so that keep_cache is refused once a position is computed. */
EDGELORA_API EdgeLoraStatus edgelora_session_set_adapter(EdgeLoraSession* session,
                                                         EdgeLoraAdapter adapter, bool keep_cache);

/* Appends tokens; afterwards the logits of the last one are at hand. At least one token. On error
 * the session is as before. */
EDGELORA_API EdgeLoraStatus edgelora_session_prefill(EdgeLoraSession* session,
                                                     const int32_t* tokens, size_t count);

/* As prefill, and copies the logits of *every* appended token: logits [count, vocab_size]. */
EDGELORA_API EdgeLoraStatus edgelora_session_logits(EdgeLoraSession* session, const int32_t* tokens,
                                                    size_t count, float* logits);

/* Logits of the last position [vocab_size], valid until the session's next call. NULL if they are
 * not at hand: before the first prefill, after a rewind, after a change of adapter that computes
 * anew, and after a generate that ended by length, callback or context (its last token is computed
 * when something follows it). */
EDGELORA_API const float* edgelora_session_last_logits(const EdgeLoraSession* session);

/* Positions of the sequence: tokens prefilled and generated, an adapter's prefix not counted. */
EDGELORA_API size_t edgelora_session_position(const EdgeLoraSession* session);

/* Forgets all positions after `position` (0: everything). */
EDGELORA_API EdgeLoraStatus edgelora_session_rewind(EdgeLoraSession* session, size_t position);

typedef struct EdgeLoraSampling {
  size_t size;
  float temperature; /* 0: greedy (default) */
  int32_t top_k;     /* 0: off */
  float top_p;       /* 1: off */
  float min_p;       /* 0: off */
  /* 1e-6 to 1e6, 1: off; over all tokens of the session (Keskar et al. 2019, as transformers) */
  float repetition_penalty;
  uint64_t seed;              /* same seed, same tokens */
  const int32_t* stop_tokens; /* besides the model's eos_token_ids */
  size_t stop_token_count;
  bool ignore_eos; /* benchmarks: the model's own eos tokens do not stop */
} EdgeLoraSampling;

EDGELORA_API void edgelora_sampling_init(EdgeLoraSampling* sampling);

/* One new token: true goes on, false stops after it. Called on the generating thread.
 *
 * It may call whatever takes another session, a model or an adapter. Of its own session it may ask
 * position, last_logits (NULL) and timings, call cancel, and call free, which takes effect when the
 * generate returns; all else is refused with EDGELORA_INVALID_ARGUMENT.
 * It must return: neither a C++ exception nor longjmp may leave it, since nothing can catch them
 * on the way through this library. */
typedef bool (*EdgeLoraTokenCallback)(int32_t token, void* user_data);

typedef enum EdgeLoraFinish {
  EDGELORA_FINISH_LENGTH = 0,   /* max_new_tokens reached */
  EDGELORA_FINISH_STOP = 1,     /* a stop token; it is not delivered */
  EDGELORA_FINISH_CALLBACK = 2, /* the callback returned false */
  EDGELORA_FINISH_CONTEXT = 3   /* the context is full */
} EdgeLoraFinish;

/* Generates up to max_new_tokens after a prefill; delivers each token to callback (may be NULL) and
 * to tokens (may be NULL; room for max_new_tokens). sampling, count and finish may be NULL
 * (sampling: greedy). Every delivered token is part of the sequence: the next prefill or generate
 * goes on after it. On an error, EDGELORA_CANCELLED too, the tokens delivered until then stay in
 * it: edgelora_session_position tells how many. */
EDGELORA_API EdgeLoraStatus edgelora_session_generate(EdgeLoraSession* session,
                                                      const EdgeLoraSampling* sampling,
                                                      size_t max_new_tokens, int32_t* tokens,
                                                      size_t* count, EdgeLoraFinish* finish,
                                                      EdgeLoraTokenCallback callback,
                                                      void* user_data);

/* Makes a running generate, prefill or logits of this session return EDGELORA_CANCELLED soon;
 * nothing if none runs. From any thread. The session stays usable. */
EDGELORA_API void edgelora_session_cancel(EdgeLoraSession* session);

/* Durations of the session's last prefill (or logits) and generate, for benchmarks. Tokens: the
 * positions computed in that time. A generate of n tokens right after a prefill computes n − 1: the
 * first token comes from the prefill's logits. */
typedef struct EdgeLoraTimings {
  size_t size;
  double prefill_seconds;
  int64_t prefill_tokens;
  double decode_seconds;
  int64_t decode_tokens;
} EdgeLoraTimings;

EDGELORA_API EdgeLoraStatus edgelora_session_timings(const EdgeLoraSession* session,
                                                     EdgeLoraTimings* timings);

#ifdef __cplusplus
}
#endif

#endif /* EDGELORA_H_ */
