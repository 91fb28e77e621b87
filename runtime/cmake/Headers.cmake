# Finds the two header-only build dependencies: ONNXRUNTIME_INCLUDE_DIR and NLOHMANN_JSON_INCLUDE_DIR.
# Order: what the caller gave, the system's, else fetched into EDGELORA_HEADER_CACHE.
set(EDGELORA_HEADER_CACHE "" CACHE PATH "Folder for fetched headers; empty: ~/.cache/edgelora/headers")

find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h PATH_SUFFIXES onnxruntime onnxruntime/core/session)
find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp)

if(NOT ONNXRUNTIME_INCLUDE_DIR OR NOT NLOHMANN_JSON_INCLUDE_DIR)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/fetch_headers.py ${EDGELORA_HEADER_CACHE}
    OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_VARIABLE problem ERROR_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${problem}")
  endif()
  if(problem)
    message(STATUS "${problem}")
  endif()
  string(REPLACE "\n" ";" folders "${folders}")
  foreach(name IN ITEMS ONNXRUNTIME_INCLUDE_DIR NLOHMANN_JSON_INCLUDE_DIR)
    list(POP_FRONT folders folder)
    if(NOT ${name})
      set(${name} "${folder}" CACHE PATH "Include folder" FORCE)
    endif()
  endforeach()
endif()

foreach(name IN ITEMS ONNXRUNTIME_INCLUDE_DIR NLOHMANN_JSON_INCLUDE_DIR)
  message(STATUS "${name}: ${${name}}")
endforeach()

# SYSTEM: their warnings are not ours.
add_library(edgelora_headers INTERFACE)
target_include_directories(edgelora_headers SYSTEM INTERFACE
  ${ONNXRUNTIME_INCLUDE_DIR} ${NLOHMANN_JSON_INCLUDE_DIR})
