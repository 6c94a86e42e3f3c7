//! VM specs: any text is either a spec, or refused with a reason and a remedy that can be shown.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strake_api::spec::VmSpec;

fuzz_target!(|text: &str| {
    if let Err(refused) = VmSpec::from_toml(text, "fuzz.toml") {
        assert!(!refused.text().is_empty() && !refused.remedy().is_empty());
        let _ = strake_observe::render(&refused, strake_observe::Style::Terminal);
    }
});
