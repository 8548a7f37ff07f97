// The trainer's subcommands of `strobe`.
#pragma once

namespace CLI {
class App;
}

namespace strobe::gpt {

void add_train_command(CLI::App& app);
void add_generate_command(CLI::App& app);
void add_tokenizer_command(CLI::App& app);
void add_checkpoint_command(CLI::App& app);

}  // namespace strobe::gpt
