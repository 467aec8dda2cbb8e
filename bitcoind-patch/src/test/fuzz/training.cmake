# Copyright (c) 2026-present The traincert developers
# Distributed under the MIT software license, see the accompanying
# file COPYING or https://opensource.org/license/mit/.

target_sources(fuzz PRIVATE training.cpp)

# The fuzz targets of src/training alone, without the node that upstream's other targets need.
add_executable(fuzz_training EXCLUDE_FROM_ALL
  training.cpp
  fuzz.cpp
  util/check_globals.cpp
  ../util/coverage.cpp
  ../util/random.cpp
)
# Replays inputs in builds that are not for fuzzing, too: fuzz.cpp asks for aborts on failed assumptions.
target_compile_definitions(fuzz_training PRIVATE
  ABORT_ON_FAILED_ASSUME
  $<$<NOT:$<BOOL:${FUZZ_BINARY_LINKS_WITHOUT_MAIN_FUNCTION}>>:PROVIDE_FUZZ_MAIN_FUNCTION>
)
target_link_libraries(fuzz_training
  core_interface
  fuzzer_interface
  bitcoin_common
  bitcoin_consensus
  bitcoin_util
  univalue
  secp256k1
  Boost::headers
)
