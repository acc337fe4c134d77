//! The chat templates of a tokenizer's folder: one, or several under names.
//!
//! transformers knows two forms of several: `chat_template.jinja` (the one named `default`) beside
//! `additional_chat_templates/NAME.jinja`, and a list of `{"name", "template"}` in `tokenizer_config.json`. Files come
//! before settings. Here the first form becomes the second as soon as a folder is read ([`fold`]): a dataset's and a
//! checkpoint's folder hold no further folders, and every version of transformers reads the list.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::{
    layout::{ADDITIONAL_TEMPLATES, CHAT_TEMPLATE, CHAT_TEMPLATE_JSON, TOKENIZER_CONFIG},
    storage::{StorageError, Store},
};

/// The name of the template that is used unless another is asked for.
const DEFAULT: &str = "default";
/// The name of the template for chats with tools.
const TOOL_USE: &str = "tool_use";
/// How the names of the files of templates end.
const ENDING: &str = ".jinja";
/// The longest template that is read, bytes.
const LONGEST: u64 = 1 << 20;

/// The additional templates of a folder of a store, by name.
///
/// # Errors
/// Those of the store.
pub async fn additional(folder: &Store) -> Result<BTreeMap<String, Bytes>, StorageError> {
    let mut found = BTreeMap::new();
    for info in folder.list(ADDITIONAL_TEMPLATES).await? {
        if let Some(name) = info.key.strip_prefix(ADDITIONAL_TEMPLATES).and_then(|rest| template_name(rest)) {
            found.insert(name.to_owned(), folder.get(&info.key, LONGEST).await?);
        }
    }
    Ok(found)
}

/// `/NAME.jinja`
fn template_name(rest: &str) -> Option<&str> {
    let name = rest.strip_prefix('/')?.strip_suffix(ENDING)?;
    (!name.is_empty() && !name.contains('/')).then_some(name)
}

/// Moves additional templates, and the default one beside them, into the tokenizer's settings among a folder's files.
///
/// # Errors
/// The reason, if settings or templates can't be read.
pub fn fold(files: &mut Vec<(String, Bytes)>, additional: &BTreeMap<String, Bytes>) -> Result<(), String> {
    if additional.is_empty() {
        return Ok(());
    }
    let take = |files: &mut Vec<(String, Bytes)>, name: &str| {
        let at = files.iter().position(|(file, _)| file == name)?;
        Some(files.remove(at).1)
    };
    // An additional template of this name would win: it is read last.
    let default = take(files, CHAT_TEMPLATE).map(|bytes| (DEFAULT.to_owned(), bytes));
    take(files, CHAT_TEMPLATE_JSON);
    let mut named: BTreeMap<String, Bytes> = default.into_iter().collect();
    named.extend(additional.iter().map(|(name, bytes)| (name.clone(), bytes.clone())));
    let mut list = Vec::with_capacity(named.len());
    for (name, bytes) in named {
        let template =
            std::str::from_utf8(&bytes).map_err(|_| format!("has a chat template {name:?} that is not UTF-8"))?;
        list.push(json!({"name": name, "template": template}));
    }
    let mut settings = match take(files, TOKENIZER_CONFIG) {
        Some(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| format!("has a {TOKENIZER_CONFIG} that is not JSON: {error}"))?,
        None => json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false}),
    };
    match settings.as_object_mut() {
        Some(settings) => settings.insert("chat_template".into(), list.into()),
        None => return Err(format!("has a {TOKENIZER_CONFIG} that is no JSON object")),
    };
    let bytes = serde_json::to_vec_pretty(&settings).map_err(|error| error.to_string())?;
    files.push((TOKENIZER_CONFIG.to_owned(), bytes.into()));
    Ok(())
}

/// The templates of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Templates {
    /// One without a name.
    One(String),
    /// Several by name.
    Named(BTreeMap<String, String>),
}

/// The templates that chats are rendered by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chosen {
    /// For chats without tools; `None`: no template is for these.
    pub plain: Option<String>,
    /// For chats with tools.
    pub tools: String,
}

impl Templates {
    /// What `chat_template` of a tokenizer's settings holds; `None`: no template.
    pub(super) fn of_settings(value: &Value) -> Result<Option<Self>, &'static str> {
        let list = match value {
            Value::String(text) => return Ok(Some(Self::One(text.clone()))),
            Value::Array(list) => list,
            _ => return Ok(None),
        };
        let named =
            list.iter().map(|one| Some((one["name"].as_str()?.to_owned(), one["template"].as_str()?.to_owned())));
        let named: Option<BTreeMap<_, _>> = named.collect();
        let named = named.ok_or("has a list of chat templates, one of them without a name and a template")?;
        Ok((!named.is_empty()).then_some(Self::Named(named)))
    }

    /// Chooses as `apply_chat_template` of transformers does, unless a name is `asked` for: that named `tool_use` for
    /// chats with tools, and otherwise that named `default`.
    ///
    /// # Errors
    /// The reason, if there is no such template.
    pub(super) fn choose(self, asked: Option<&str>) -> Result<Chosen, String> {
        let mut named = match (self, asked) {
            (Self::One(text), None | Some(DEFAULT)) => {
                return Ok(Chosen { plain: Some(text.clone()), tools: text });
            }
            (Self::One(_), Some(asked)) => {
                return Err(format!("has one chat template and none named {asked:?}; leave --chat-template out"));
            }
            (Self::Named(named), _) => named,
        };
        let names = || named.keys().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
        if let Some(asked) = asked {
            let all = names();
            let text = named.remove(asked);
            let text =
                text.ok_or_else(|| format!("has no chat template {asked:?}; --chat-template takes one of {all}"))?;
            return Ok(Chosen { plain: Some(text.clone()), tools: text });
        }
        let none = format!(
            "has several chat templates, none of them named {DEFAULT:?}: choose one of {} with --chat-template",
            names()
        );
        let plain = named.remove(DEFAULT);
        let tools = named.remove(TOOL_USE).or_else(|| plain.clone()).ok_or(none)?;
        Ok(Chosen { plain, tools })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &[&str]) -> Value {
        names.iter().map(|name| json!({"name": name, "template": format!("by {name}")})).collect()
    }

    fn chosen(settings: &Value, asked: Option<&str>) -> Result<(Option<String>, String), String> {
        let chosen = Templates::of_settings(settings)?.ok_or("none")?.choose(asked)?;
        Ok((chosen.plain, chosen.tools))
    }

    #[test]
    fn a_template_is_chosen_as_transformers_chooses_it() {
        let both = |text: &str| Ok((Some(text.to_owned()), text.to_owned()));
        assert_eq!(chosen(&json!("one"), None), both("one"));
        assert_eq!(chosen(&json!("one"), Some("default")), both("one"));
        assert!(chosen(&json!("one"), Some("rag")).unwrap_err().contains("none named \"rag\""));
        let several = list(&["default", "rag"]);
        assert_eq!(chosen(&several, None), both("by default"));
        assert_eq!(chosen(&several, Some("rag")), both("by rag"));
        let with_tools = list(&["default", "tool_use", "rag"]);
        assert_eq!(chosen(&with_tools, None), Ok((Some("by default".into()), "by tool_use".into())));
        assert_eq!(chosen(&with_tools, Some("default")), both("by default"));
        assert_eq!(chosen(&with_tools, Some("tool_use")), both("by tool_use"));
        assert_eq!(chosen(&list(&["tool_use", "rag"]), None), Ok((None, "by tool_use".into())));
        let error = chosen(&list(&["rag", "a"]), None).unwrap_err();
        assert!(error.contains("\"a\", \"rag\" with --chat-template"), "{error}");
        let error = chosen(&with_tools, Some("nope")).unwrap_err();
        assert!(error.contains("no chat template \"nope\"") && error.contains("\"rag\""), "{error}");
        assert!(chosen(&json!([{"name": "default"}]), None).is_err());
        for none in [json!(null), json!([]), json!({})] {
            assert_eq!(Templates::of_settings(&none), Ok(None), "{none}");
        }
    }

    #[test]
    fn files_of_templates_become_a_list_in_the_settings() {
        let file = |name: &str, text: &str| (name.to_owned(), Bytes::from(text.to_owned()));
        let before = vec![
            file(CHAT_TEMPLATE, "the default"),
            file(CHAT_TEMPLATE_JSON, "{\"chat_template\": \"another\"}"),
            file(TOKENIZER_CONFIG, "{\"eos_token\": \"</s>\", \"chat_template\": \"a third\"}"),
            file("merges.txt", "a b"),
        ];
        let mut files = before.clone();
        fold(&mut files, &BTreeMap::new()).unwrap();
        assert_eq!(files, before, "one template stays where it is");
        let additional = BTreeMap::from([file("tool_use", "with tools")]);
        fold(&mut files, &additional).unwrap();
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["merges.txt", TOKENIZER_CONFIG]);
        let settings: Value = serde_json::from_slice(&files[1].1).unwrap();
        assert_eq!(settings["eos_token"], "</s>");
        let list = json!([
            {"name": "default", "template": "the default"}, {"name": "tool_use", "template": "with tools"},
        ]);
        assert_eq!(settings["chat_template"], list);
        let again = files.clone();
        fold(&mut files, &BTreeMap::new()).unwrap();
        assert_eq!(files, again);

        let mut alone = Vec::new();
        fold(&mut alone, &additional).unwrap();
        let settings: Value = serde_json::from_slice(&alone[0].1).unwrap();
        assert_eq!(settings["chat_template"], json!([{"name": "tool_use", "template": "with tools"}]));
        let bad = BTreeMap::from([("x".to_owned(), Bytes::from_static(b"\xff"))]);
        assert!(fold(&mut Vec::new(), &bad).unwrap_err().contains("\"x\" that is not UTF-8"));
        assert!(fold(&mut vec![file(TOKENIZER_CONFIG, "[]")], &additional).unwrap_err().contains("no JSON object"));
    }

    #[tokio::test]
    async fn additional_templates_are_found_in_a_store() {
        let store = Store::open("memory://", &crate::config::StorageConfig::plain(8, 1)).unwrap();
        for name in ["tool_use.jinja", "rag.jinja", "notes.txt", "deep/x.jinja", ".jinja"] {
            store.put(&format!("{ADDITIONAL_TEMPLATES}/{name}"), name.to_owned().into()).await.unwrap();
        }
        store.put(CHAT_TEMPLATE, "x".into()).await.unwrap();
        let found = additional(&store).await.unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), ["rag", "tool_use"]);
        assert_eq!(found["rag"], "rag.jinja");
    }
}
