# Linux libraries that run on every glibc since EDGELORA_GLIBC, with the C++ library inside: what wheels need.
# The compiler is `zig c++` (PyPI: ziglang); EDGELORA_ARCH is aarch64 or x86_64.
set(EDGELORA_ARCH aarch64 CACHE STRING "aarch64 or x86_64")
set(EDGELORA_GLIBC 2.17 CACHE STRING "Oldest glibc")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES EDGELORA_ARCH EDGELORA_GLIBC EDGELORA_ZIG)

find_program(EDGELORA_ZIG NAMES zig python-zig REQUIRED)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR ${EDGELORA_ARCH})
set(target ${EDGELORA_ARCH}-linux-gnu.${EDGELORA_GLIBC})
set(CMAKE_C_COMPILER ${EDGELORA_ZIG} cc -target ${target})
set(CMAKE_CXX_COMPILER ${EDGELORA_ZIG} c++ -target ${target})

# The machine's own ar and strip may not know the architecture: zig archives, and its linker strips.
set(CMAKE_AR ${EDGELORA_ZIG})
set(CMAKE_RANLIB "")
set(CMAKE_STRIP "")
set(CMAKE_SHARED_LINKER_FLAGS_RELEASE_INIT -s)
foreach(language IN ITEMS C CXX)
  set(CMAKE_${language}_ARCHIVE_CREATE "<CMAKE_AR> ar qc <TARGET> <LINK_FLAGS> <OBJECTS>")
  set(CMAKE_${language}_ARCHIVE_APPEND "<CMAKE_AR> ar q <TARGET> <LINK_FLAGS> <OBJECTS>")
  set(CMAKE_${language}_ARCHIVE_FINISH "<CMAKE_AR> ar s <TARGET>")
endforeach()
