# Debian's g++-aarch64-linux-gnu; its programs run under qemu-user-static where that is installed.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

find_program(EDGELORA_QEMU qemu-aarch64-static)
set(EDGELORA_QEMU_CPU max CACHE STRING "CPU model of the emulator: cortex-a53, cortex-a76 or max")
if(EDGELORA_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${EDGELORA_QEMU} -cpu ${EDGELORA_QEMU_CPU} -L /usr/aarch64-linux-gnu)
endif()
