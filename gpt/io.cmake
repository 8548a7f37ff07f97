# Tokens, data and checkpoints of the GPT: everything under gpt/ that touches files, and what they need to know of a model.
# Uses no attention and no GPU.
find_package(PkgConfig REQUIRED)
find_package(nlohmann_json 3.11 REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)

set(STROBE_GPT_IO_SOURCES
    config.cpp
    parameters.cpp
    weights.cpp
    checkpoint/checkpoint.cpp
    checkpoint/checkpoint_store.cpp
    checkpoint/hf_config.cpp
    checkpoint/safetensors.cpp
    checkpoint/weights.cpp
    data/corpus.cpp
    data/dataset.cpp
    data/sampler.cpp
    data/token_shard.cpp
    io/durable_file.cpp
    io/mapped_file.cpp
    io/strict_json.cpp
    io/xxhash64.cpp
    text/utf8.cpp
    tokenizer/base64.cpp
    tokenizer/bpe_trainer.cpp
    tokenizer/byte_alphabet.cpp
    tokenizer/merge_table.cpp
    tokenizer/printable_vocabulary.cpp
    tokenizer/splitter.cpp
    tokenizer/tokenizer.cpp
    tokenizer/tokenizer_json.cpp
    tokenizer/vocabulary.cpp
    tokenizer/vocabulary_files.cpp
    tokenizer/vocabulary_writer.cpp)
list(TRANSFORM STROBE_GPT_IO_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)

add_library(strobe_gpt_io STATIC ${STROBE_GPT_IO_SOURCES})
strobe_configure_target(strobe_gpt_io)
target_include_directories(strobe_gpt_io PUBLIC ${PROJECT_SOURCE_DIR})
target_link_libraries(strobe_gpt_io PUBLIC nlohmann_json::nlohmann_json PRIVATE PkgConfig::PCRE2)

if(STROBE_BUILD_TESTS)
    enable_testing()
    add_subdirectory(${CMAKE_CURRENT_LIST_DIR}/tests/io)
endif()
