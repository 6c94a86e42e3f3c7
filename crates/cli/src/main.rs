//! `strake`: see the library.

fn main() -> std::process::ExitCode {
    strake_cli::main()
}
