#include "gpt/checkpoint/hf_config.hpp"

#include <cmath>
#include <initializer_list>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "gpt/io/file_error.hpp"
#include "gpt/io/strict_json.hpp"

namespace strobe::gpt {
namespace {

using Json = nlohmann::json;

class ConfigReader {
public:
    ConfigReader(const Json& document, const std::filesystem::path& file) : document_(document), file_(file) {}

    [[noreturn]] void refuse(std::string_view problem) const { throw FileError(file_, problem); }

    /// Null when absent or null.
    const Json* find(const char* name) const {
        const auto found = document_.find(name);
        return found == document_.end() || found->is_null() ? nullptr : &*found;
    }

    int64_t integer(const char* name) const {
        const Json* value = find(name);
        if (value == nullptr) refuse(fmt::format("has no {}", name));
        return to_integer(name, *value);
    }
    int64_t integer_or(const char* name, int64_t otherwise) const {
        const Json* value = find(name);
        return value == nullptr ? otherwise : to_integer(name, *value);
    }
    float number_or(const char* name, float otherwise) const {
        const Json* value = find(name);
        if (value == nullptr) return otherwise;
        return to_number(name, *value);
    }
    float to_number(const char* name, const Json& value) const {
        if (!value.is_number() || !std::isfinite(value.get<float>())) {
            refuse(fmt::format("{} is {}, expected a number that fp32 can hold", name, shown(value)));
        }
        return value.get<float>();
    }
    bool boolean_or(const char* name, bool otherwise) const {
        const Json* value = find(name);
        if (value == nullptr) return otherwise;
        if (!value->is_boolean()) refuse(fmt::format("{} is {}, expected true or false", name, shown(*value)));
        return value->get<bool>();
    }

    /// The field must be absent or equal one of the values.
    void expect(const char* name, std::initializer_list<Json> possible) const {
        const Json* value = find(name);
        if (value == nullptr) return;
        std::string choices;
        for (const Json& choice : possible) {
            if (*value == choice) return;
            choices += (choices.empty() ? "" : " or ") + choice.dump();
        }
        refuse(fmt::format("{} is {}; only {} is supported", name, shown(*value), choices));
    }

private:
    static std::string shown(const Json& value) { return value.dump().substr(0, 60); }

    int64_t to_integer(const char* name, const Json& value) const {
        if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<uint64_t>() > INT32_MAX)) {
            refuse(fmt::format("{} is {}, expected a whole number below 2^31", name, shown(value)));
        }
        return value.get<int64_t>();
    }

    const Json& document_;
    const std::filesystem::path& file_;
};

ModelConfig read_gpt2(const ConfigReader& in) {
    in.expect("activation_function", {"gelu_new", "gelu_pytorch_tanh"});
    in.expect("scale_attn_weights", {true});
    in.expect("scale_attn_by_inverse_layer_idx", {false});
    in.expect("add_cross_attention", {false});
    in.expect("tie_word_embeddings", {true});
    ModelConfig config;
    config.architecture = Architecture::gpt2;
    config.vocab_size = in.integer("vocab_size");
    config.context_length = in.integer_or("n_positions", in.integer_or("n_ctx", 1024));
    config.num_layers = in.integer("n_layer");
    config.hidden_size = in.integer("n_embd");
    config.num_heads = config.num_heads_k = in.integer("n_head");
    if (config.num_heads < 1) in.refuse(fmt::format("n_head is {}", config.num_heads));
    config.head_dim = config.hidden_size / config.num_heads;
    config.ffn_size = in.integer_or("n_inner", 4 * config.hidden_size);
    config.norm_eps = in.number_or("layer_norm_epsilon", 1e-5f);
    config.init_std = in.number_or("initializer_range", 0.02f);
    config.tied_head = true;
    return config;
}

float read_rope_theta(const ConfigReader& in) {
    const Json* parameters = in.find("rope_parameters");
    if (parameters == nullptr) parameters = in.find("rope_scaling");
    if (parameters == nullptr) return in.number_or("rope_theta", 10000.0f);
    if (!parameters->is_object()) in.refuse("its rotary parameters are not an object");
    for (const char* name : {"rope_type", "type"}) {
        if (parameters->contains(name) && parameters->at(name) != "default") {
            in.refuse(fmt::format("rotary type {} is not supported", parameters->at(name).dump().substr(0, 60)));
        }
    }
    if (parameters->contains("partial_rotary_factor") && parameters->at("partial_rotary_factor") != 1.0) {
        in.refuse("partial rotary positions are not supported");
    }
    const auto theta = parameters->find("rope_theta");
    if (theta == parameters->end()) return in.number_or("rope_theta", 10000.0f);
    return in.to_number("rope_theta", *theta);
}

ModelConfig read_llama(const ConfigReader& in) {
    in.expect("hidden_act", {"silu"});
    in.expect("attention_bias", {false});
    in.expect("mlp_bias", {false});
    ModelConfig config;
    config.architecture = Architecture::llama;
    config.vocab_size = in.integer("vocab_size");
    config.context_length = in.integer_or("max_position_embeddings", 2048);
    config.num_layers = in.integer("num_hidden_layers");
    config.hidden_size = in.integer("hidden_size");
    config.num_heads = in.integer("num_attention_heads");
    config.num_heads_k = in.integer_or("num_key_value_heads", config.num_heads);
    if (config.num_heads < 1) in.refuse(fmt::format("num_attention_heads is {}", config.num_heads));
    config.head_dim = in.integer_or("head_dim", config.hidden_size / config.num_heads);
    config.ffn_size = in.integer("intermediate_size");
    config.norm_eps = in.number_or("rms_norm_eps", 1e-6f);
    config.rope_theta = read_rope_theta(in);
    config.init_std = in.number_or("initializer_range", 0.02f);
    config.tied_head = in.boolean_or("tie_word_embeddings", false);
    return config;
}

}  // namespace

namespace {

/// The number of fewest digits that reads back as `value`: 1e-05, not 9.999999747378752e-06.
double shortest(float value) { return std::stod(fmt::format("{}", value)); }

}  // namespace

Json to_hf_config(const ModelConfig& c, TokenId end_of_text) {
    Json out = {{"dtype", "float32"}, {"vocab_size", c.vocab_size}, {"tie_word_embeddings", c.tied_head}, {"initializer_range", shortest(c.init_std)}, {"use_cache", true}};
    out["bos_token_id"] = out["eos_token_id"] = end_of_text < 0 ? Json() : Json(end_of_text);
    if (c.architecture == Architecture::gpt2) {
        out.update({{"model_type", "gpt2"}, {"architectures", {"GPT2LMHeadModel"}}, {"n_positions", c.context_length},
                    {"n_layer", c.num_layers}, {"n_embd", c.hidden_size}, {"n_head", c.num_heads}, {"n_inner", c.ffn_size},
                    {"activation_function", "gelu_new"}, {"layer_norm_epsilon", shortest(c.norm_eps)}, {"resid_pdrop", 0.0},
                    {"embd_pdrop", 0.0}, {"attn_pdrop", 0.0}, {"scale_attn_weights", true},
                    {"scale_attn_by_inverse_layer_idx", false}});
    } else {
        out.update({{"model_type", "llama"}, {"architectures", {"LlamaForCausalLM"}}, {"max_position_embeddings", c.context_length},
                    {"num_hidden_layers", c.num_layers}, {"hidden_size", c.hidden_size}, {"num_attention_heads", c.num_heads},
                    {"num_key_value_heads", c.num_heads_k}, {"head_dim", c.head_dim}, {"intermediate_size", c.ffn_size},
                    {"hidden_act", "silu"}, {"rms_norm_eps", shortest(c.norm_eps)}, {"rope_theta", shortest(c.rope_theta)},
                    {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", shortest(c.rope_theta)}}}, {"attention_bias", false},
                    {"attention_dropout", 0.0}, {"mlp_bias", false}});
    }
    return out;
}

ModelConfig parse_hf_config(std::string_view text, const std::filesystem::path& file) {
    const Json document = parse_strict_json(text, file, {.max_bytes = size_t{1} << 20});
    if (!document.is_object()) throw FileError(file, "is not a JSON object");
    const ConfigReader in(document, file);
    const Json* type = in.find("model_type");
    if (type == nullptr || (*type != "gpt2" && *type != "llama")) {
        in.refuse(fmt::format("model_type is {}; only \"gpt2\" and \"llama\" are supported", type == nullptr ? "missing" : type->dump().substr(0, 60)));
    }
    const ModelConfig config = *type == "gpt2" ? read_gpt2(in) : read_llama(in);
    try {
        config.validate();
    } catch (const std::invalid_argument& problem) {
        throw FileError(file, problem.what());
    }
    return config;
}

}  // namespace strobe::gpt
