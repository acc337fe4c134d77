//! Compares what a folder's settings say about the tokens around a text with what its tokenizer does.
//!
//! `tokenizer.json` has a post-processor that may put tokens around a text; `tokenizer_config.json` may have
//! `add_bos_token` and `add_eos_token`. Where these contradict each other, the readers do, too: `tokenizers` and
//! transformers 5 do what the post-processor says, whatever the flags; transformers 4 builds the post-processor of a
//! few classes anew from the flags, or from the defaults of the class. Here the post-processor counts, and the flags of
//! what is written are made to agree with it, so that every reader of a checkpoint does what the data was made with.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::layout::{TOKENIZER, TOKENIZER_CONFIG};

/// The classes whose post-processor transformers 4 builds anew, and whether they put a begin token by default. None
/// puts an end token.
const REBUILT: [(&str, bool); 5] =
    [("Llama", true), ("CodeLlama", true), ("Gemma", true), ("Cohere", true), ("GPTNeoX", false)];

/// The tokens around a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Around {
    begin: Option<String>,
    end: Option<String>,
}

impl Around {
    /// What the post-processor of a `tokenizer.json` puts; `None`: it has one of a kind that the flags can't describe.
    fn of_json(json: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Only {
            #[serde(default)]
            post_processor: Value,
        }
        let Only { post_processor } = serde_json::from_slice(json).ok()?;
        let mut found = Self::default();
        match post_processor["processors"].as_array() {
            Some(steps) => steps.iter().try_for_each(|step| found.add(step))?,
            None => found.add(&post_processor)?,
        }
        Some(found)
    }

    fn add(&mut self, step: &Value) -> Option<()> {
        match step["type"].as_str() {
            Some("TemplateProcessing") => {
                let pieces = step["single"].as_array()?;
                let text = pieces.iter().position(|piece| piece.get("Sequence").is_some())?;
                let token = |pieces: &[Value]| match pieces {
                    [] => Some(None),
                    [one] => Some(Some(one["SpecialToken"]["id"].as_str()?.to_owned())),
                    _ => None,
                };
                (self.begin, self.end) = (token(&pieces[..text])?, token(&pieces[text + 1..])?);
                Some(())
            }
            Some("BertProcessing" | "RobertaProcessing") => None,
            _ => Some(()),
        }
    }
}

/// Makes a tokenizer's settings agree with its `tokenizer.json`; returns what contradicted it, in words. Settings
/// without a contradiction stay as they are.
pub fn agree(settings: &mut Map<String, Value>, json: &[u8]) -> Vec<String> {
    let class = settings.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    let short = class.strip_suffix("Fast").unwrap_or(class).strip_suffix("Tokenizer").unwrap_or_default();
    let rebuilt = REBUILT.iter().find(|(name, _)| *name == short);
    const KEYS: [&str; 2] = ["add_bos_token", "add_eos_token"];
    if rebuilt.is_none() && KEYS.iter().all(|key| !settings.contains_key(*key)) {
        return Vec::new();
    }
    let Some(does) = Around::of_json(json) else { return Vec::new() };
    let class = class.to_owned();
    let mut said = Vec::new();
    let defaults = rebuilt.map(|(_, begin)| [*begin, false]);
    for (which, (key, token)) in KEYS.into_iter().zip([&does.begin, &does.end]).enumerate() {
        let (place, name) = [("before", "bos_token"), ("behind", "eos_token")][which];
        let puts = token.is_some();
        let explicit = settings.get(key).and_then(Value::as_bool);
        let says = explicit.or(defaults.map(|defaults| defaults[which]));
        let does = match token {
            Some(token) => format!("{TOKENIZER} puts {token:?} {place} a text"),
            None => format!("{TOKENIZER} puts no token {place} a text"),
        };
        let readers = match rebuilt {
            Some(_) => format!("transformers 4 would obey {class}"),
            None => format!("transformers obeys {TOKENIZER}"),
        };
        if says.is_some_and(|says| says != puts) {
            let how = match explicit {
                Some(says) => format!("{TOKENIZER_CONFIG} has {key} {says}"),
                None => format!("{TOKENIZER_CONFIG} has no {key}, which is {} for {class}", !puts),
            };
            said.push(format!("{how}, but {does}, which counts ({readers}); checkpoints say {key} {puts}"));
            settings.insert(key.into(), puts.into());
        }
        // The class puts the token that the settings name.
        let named = settings.get(name).map(|token| token.get("content").unwrap_or(token)).and_then(Value::as_str);
        if let (Some(token), Some(named), Some(_)) = (token, named, rebuilt)
            && named != token
        {
            said.push(format!("{TOKENIZER_CONFIG} has {name} {named:?}, but {does}, which counts ({readers})"));
        }
    }
    said
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tokenizer(begin: bool, end: bool) -> Vec<u8> {
        let mut pieces = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        if begin {
            pieces.insert(0, json!({"SpecialToken": {"id": "<s>", "type_id": 0}}));
        }
        if end {
            pieces.push(json!({"SpecialToken": {"id": "</s>", "type_id": 0}}));
        }
        let step = json!({"type": "TemplateProcessing", "single": pieces, "pair": []});
        let steps = json!({"type": "Sequence", "processors": [{"type": "ByteLevel"}, step]});
        json!({"post_processor": if begin { steps } else { step }, "model": {}}).to_string().into_bytes()
    }

    fn agreed(settings: Value, json: &[u8]) -> (Value, Vec<String>) {
        let Value::Object(mut settings) = settings else { panic!("no object") };
        let said = agree(&mut settings, json);
        (Value::Object(settings), said)
    }

    #[test]
    fn the_post_processor_counts_and_flags_that_contradict_it_are_named_and_changed() {
        let flags = [None, Some(true), Some(false)];
        let classes =
            [("LlamaTokenizer", Some(true)), ("GemmaTokenizerFast", Some(true)), ("CohereTokenizer", Some(true))];
        let more = [("GPTNeoXTokenizer", Some(false)), ("Qwen2Tokenizer", None), ("PreTrainedTokenizerFast", None)];
        for (class, default) in classes.into_iter().chain(more) {
            for (begin, end) in [(false, false), (true, false), (true, true)] {
                for (bos, eos) in flags.iter().flat_map(|bos| flags.map(|eos| (*bos, eos))) {
                    let mut settings = json!({"tokenizer_class": class, "bos_token": "<s>", "eos_token": "</s>"});
                    let given = [("add_bos_token", bos), ("add_eos_token", eos)];
                    for (key, flag) in given.iter().filter_map(|(key, flag)| Some((key, (*flag)?))) {
                        settings[*key] = flag.into();
                    }
                    let (after, said) = agreed(settings.clone(), &tokenizer(begin, end));
                    let effective = [bos.or(default), eos.or(default.map(|_| false))];
                    let wrong = |at: usize, does: bool| effective[at].is_some_and(|says| says != does);
                    let count = usize::from(wrong(0, begin)) + usize::from(wrong(1, end));
                    assert_eq!(said.len(), count, "{class} {bos:?} {eos:?} {begin} {end}: {said:?}");
                    assert_eq!(after == settings, count == 0);
                    for (key, does) in [("add_bos_token", begin), ("add_eos_token", end)] {
                        // Explicitly, or by the class's default.
                        let says = after.get(key).and_then(Value::as_bool);
                        let default = if key == "add_bos_token" { default } else { default.map(|_| false) };
                        assert!(says.or(default).is_none_or(|says| says == does), "{class} {key}: {after}");
                    }
                }
            }
        }
        let (_, said) = agreed(json!({"tokenizer_class": "LlamaTokenizer"}), &tokenizer(false, false));
        assert!(said[0].contains("no add_bos_token, which is true for LlamaTokenizer"), "{said:?}");
        let (_, said) = agreed(json!({"add_eos_token": true}), &tokenizer(true, false));
        assert!(said[0].contains("has add_eos_token true, but tokenizer.json puts no token behind"), "{said:?}");
    }

    #[test]
    fn another_token_is_named_and_other_steps_are_let_be() {
        let llama = json!({"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<bos>"}});
        let (after, said) = agreed(llama.clone(), &tokenizer(true, false));
        assert_eq!(after, llama);
        assert!(
            said.len() == 1 && said[0].contains("bos_token \"<bos>\", but tokenizer.json puts \"<s>\""),
            "{said:?}"
        );
        for json in [&b"{}"[..], b"{\"post_processor\": null}"] {
            assert_eq!(agreed(llama.clone(), json).1.len(), 1, "the class puts a token, this does not");
        }
        for json in [&b"no JSON"[..], br#"{"post_processor": {"type": "RobertaProcessing"}}"#] {
            assert_eq!(agreed(llama.clone(), json), (llama.clone(), vec![]));
        }
    }
}
