# Stands in for the NDK's file of this name in the preset android-arm64, where there is no NDK: Debian's clang generates
# code for the preset's Android, but sees the headers of the cross compiler's glibc and libstdc++, not
# bionic's and libc++'s. So this shows that our sources and the preset compile for Android's target, not that they
# link with Android's libraries.
foreach(variable IN ITEMS ANDROID_ABI ANDROID_PLATFORM ANDROID_STL)
  if(NOT ${variable})
    message(FATAL_ERROR "the preset does not set ${variable}")
  endif()
endforeach()
if(NOT ANDROID_ABI STREQUAL arm64-v8a)
  message(FATAL_ERROR "ANDROID_ABI is ${ANDROID_ABI}")
endif()
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ANDROID_ABI ANDROID_PLATFORM ANDROID_STL)

# Not "Android": CMake would look for a real NDK.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
string(REPLACE android- "" api ${ANDROID_PLATFORM})
set(CMAKE_C_COMPILER clang)
set(CMAKE_CXX_COMPILER clang++)
set(CMAKE_C_COMPILER_TARGET aarch64-linux-android${api})
set(CMAKE_CXX_COMPILER_TARGET aarch64-linux-android${api})

set(cross /usr/aarch64-linux-gnu/include)
file(GLOB libstdcxx ${cross}/c++/*)
list(GET libstdcxx -1 libstdcxx)
set(CMAKE_C_FLAGS_INIT "-isystem ${cross}")
set(CMAKE_CXX_FLAGS_INIT
  "-nostdinc++ -isystem ${libstdcxx} -isystem ${libstdcxx}/aarch64-linux-gnu -isystem ${cross}")
