# Copyright (c) 2026-present The traincert developers
# Distributed under the MIT software license, see the accompanying
# file COPYING or https://opensource.org/license/mit/.

target_sources(test_bitcoin PRIVATE training_tests.cpp)
target_json_data_sources(test_bitcoin data/training.json)

# The unit tests of src/training alone, so that a change there does not need all of test_bitcoin.
add_executable(test_training EXCLUDE_FROM_ALL training_tests.cpp)
target_json_data_sources(test_training data/training.json)
target_compile_definitions(test_training PRIVATE BOOST_TEST_MODULE=training)
target_compile_options(test_training PRIVATE "SHELL:-include boost/test/included/unit_test.hpp")

# The node's verdict on blocks, for tests/differential.
add_executable(training_check EXCLUDE_FROM_ALL training_check.cpp)

foreach(target IN ITEMS test_training training_check)
  target_link_libraries(${target}
    core_interface
    bitcoin_common
    bitcoin_consensus
    bitcoin_util
    univalue
    Boost::headers
  )
endforeach()
