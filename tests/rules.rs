//! The rules of the source: imports point down the list in `src/lib.rs`, some rooms stay apart, `unsafe` stays where
//! it is allowed, only the writers write to the streams of the process, lines and files stay short, pauses have names,
//! and no room has two types of one name.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Every source file below `src/`, and its text.
pub fn sources() -> Vec<(String, String)> {
    sources_below("src")
}

fn sources_below(folder: &str) -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("folder of sources") {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut paths = Vec::new();
    walk(&root, &mut paths);
    paths.sort();
    let name = |path: &Path| path.strip_prefix(&root).expect("below the root").display().to_string();
    paths.iter().map(|path| (name(path), std::fs::read_to_string(path).expect("read source"))).collect()
}

/// The code of a file, without comments and without the unit tests at its foot.
pub fn code(text: &str) -> String {
    const TESTS: &str = "\n#[cfg(test)]\nmod ";
    let (mut body, mut rest) = (String::new(), text);
    while let Some(at) = rest.find(TESTS) {
        body.push_str(&rest[..=at]);
        let tests = &rest[at + TESTS.len()..];
        match tests.find([';', '{']) {
            // They are in a file of their own.
            Some(end) if tests[end..].starts_with(';') => rest = &tests[end + 1..],
            _ => rest = "",
        }
    }
    without_comments(&(body + rest))
}

/// The text without its comments. `//` in a string or character is no comment.
fn without_comments(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let is = |at: usize, what: char| chars.get(at) == Some(&what);
    let in_word = |at: usize| chars.get(at).is_some_and(|c| c.is_alphanumeric() || *c == '_');
    let (mut at, mut kept) = (0, String::new());
    while at < chars.len() {
        let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
        let begins_word = at == 0 || !in_word(at - 1) || (is(at - 1, 'b') && (at == 1 || !in_word(at - 2)));
        let end = if is(at, '/') && is(at + 1, '/') {
            at += chars[at..].iter().take_while(|c| **c != '\n').count();
            continue;
        } else if is(at, 'r') && begins_word && is(at + 1 + hashes, '"') {
            let closes = |end: &usize| is(*end, '"') && (1..=hashes).all(|n| is(end + n, '#'));
            (at + 2 + hashes..chars.len()).find(closes).map_or(chars.len(), |end| end + 1 + hashes)
        } else if is(at, '"') {
            let mut end = at + 1;
            while end < chars.len() && !is(end, '"') {
                end += if is(end, '\\') { 2 } else { 1 };
            }
            end + 1
        } else if is(at, '\'') && is(at + 1, '\\') {
            (at + 3..chars.len()).find(|end| is(*end, '\'')).map_or(chars.len(), |end| end + 1)
        } else if is(at, '\'') && is(at + 2, '\'') {
            at + 3
        } else {
            at + 1
        };
        kept.extend(&chars[at..end.min(chars.len())]);
        at = end;
    }
    kept
}

#[test]
fn comments_end_where_code_goes_on_and_strings_hide_none() {
    for (text, kept) in [
        ("f(); // x\ng();", "f(); \ng();"),
        ("get(\"https://x\"); unsafe { g() } // y", "get(\"https://x\"); unsafe { g() } "),
        ("f(\"\\\"//\", 1) // y", "f(\"\\\"//\", 1) "),
        ("f(r#\"a\"//b\"#) // y", "f(r#\"a\"//b\"#) "),
        ("f(br\"//\\\") // y", "f(br\"//\\\") "),
        ("f('\"') // y", "f('\"') "),
        ("f('\\'', \"//\") // y", "f('\\'', \"//\") "),
        ("fn f<'a>(x: &'a str) {} // y", "fn f<'a>(x: &'a str) {} "),
        ("/// x \"y\nf()", "\nf()"),
    ] {
        assert_eq!(without_comments(text), kept);
    }
    assert_eq!(code("mod a;\n\n#[cfg(test)]\nmod testing;\nmod b;\n"), "mod a;\n\n\nmod b;\n");
    assert_eq!(code("f();\n\n#[cfg(test)]\nmod tests {\n    g();\n}\n"), "f();\n\n");
}

/// The modules of this crate that `code` names: `crate::x`, and each first name in `crate::{x::…, y}`.
fn named_modules(code: &str) -> Vec<String> {
    named_after("crate::", code)
}

/// The names behind `prefix`: `prefix::x`, and each first name in `prefix::{x::…, y}`.
fn named_after(prefix: &str, code: &str) -> Vec<String> {
    let word = |text: &str| -> String { text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect() };
    let mut found = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.push(word(rest));
            continue;
        };
        let (mut depth, mut at_start) = (0, true);
        for (index, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => at_start = true,
                c if c.is_whitespace() => {}
                _ if at_start => {
                    found.push(word(&group[index..]));
                    at_start = false;
                }
                _ => {}
            }
        }
    }
    found
}

/// The rooms in the order of `src/lib.rs`.
fn rooms() -> Vec<String> {
    let text = include_str!("../src/lib.rs");
    text.lines().filter_map(|line| Some(line.strip_prefix("pub mod ")?.strip_suffix(';')?.to_owned())).collect()
}

/// The imports of a file that break the order; empty if it keeps the order.
fn against_the_order(rooms: &[String], file: &str, text: &str) -> Vec<String> {
    let own = file.split('/').next().unwrap_or_default().trim_end_matches(".rs");
    let place = |name: &str| rooms.iter().position(|room| room == name);
    // `main.rs` and `lib.rs` are above all rooms.
    let own_place = place(own);
    named_modules(&code(text))
        .into_iter()
        .filter(|name| place(name).is_some_and(|theirs| own_place.is_some_and(|own| theirs < own)))
        .map(|name| format!("src/{file} names crate::{name}, which is above {own}"))
        .collect()
}

#[test]
fn imports_point_down_the_list_in_lib_rs() {
    let rooms = rooms();
    assert!(rooms.len() >= 10, "src/lib.rs lists {rooms:?}");
    let sources = sources();
    for (file, _) in &sources {
        let room = file.split('/').next().unwrap_or_default().trim_end_matches(".rs");
        let known =
            rooms.iter().any(|name| name == room) || ["lib", "main"].contains(&room) || file == "torch/build.rs";
        assert!(known, "src/{file} belongs to no room of src/lib.rs");
    }
    let wrong: Vec<String> = sources.iter().flat_map(|(file, text)| against_the_order(&rooms, file, text)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_import_rule_sees_every_way_to_name_a_module() {
    let rooms: Vec<String> = ["agent", "journal", "error", "ids"].map(str::to_owned).to_vec();
    let wrong = |file: &str, text: &str| against_the_order(&rooms, file, text).len();
    assert_eq!(wrong("journal/mod.rs", "use crate::agent::X;"), 1);
    assert_eq!(wrong("journal/mod.rs", "use crate::{\n    error::{A, B},\n    agent::{X, Y},\n};"), 1);
    assert_eq!(wrong("journal/deep/er.rs", "fn f(x: crate::agent::X) {}"), 1);
    assert_eq!(wrong("ids.rs", "pub(crate) use crate::{error, journal::X};"), 2);
    assert_eq!(wrong("agent/mod.rs", "use crate::{journal, error::E, ids};"), 0);
    assert_eq!(wrong("journal/mod.rs", "/// See [`crate::agent::X`].\nuse crate::journal::record;"), 0);
    assert_eq!(wrong("journal/mod.rs", "fn f() {}\n\n#[cfg(test)]\nmod tests {\n    use crate::agent::X;\n}"), 0);
    assert_eq!(wrong("main.rs", "use crate::agent::X;"), 0);
}

#[test]
fn unsafe_code_stays_in_torch_and_in_the_snapshot_image() {
    for (file, text) in sources() {
        let word = |c: char| !(c.is_alphanumeric() || c == '_');
        let uses = code(&text).split(word).any(|word| word == "unsafe");
        let allowed = file.starts_with("torch/") || file == "snapshot/image.rs";
        assert!(!uses || allowed, "src/{file} contains unsafe code");
    }
}

/// Macros that wait for the reader of a stream, and panic if there is none.
const BLUNT: [&str; 5] = ["print!", "println!", "eprint!", "eprintln!", "dbg!"];
/// The files that write to standard output and standard error.
const WRITERS: [&str; 2] = ["report/writer.rs", "cli/output.rs"];

/// The ways in which a file bypasses the writers of this process's streams.
fn written_past_the_writers(file: &str, text: &str) -> Vec<String> {
    let code = code(text);
    let macros = BLUNT.iter().filter(|name| {
        let whole = |at: usize| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        code.match_indices(**name).any(|(at, _)| whole(at))
    });
    let streams = ["stdout()", "stderr()"].iter().filter(|name| {
        // Asking whether it is a terminal is not writing.
        let asks = |rest: &str| rest.starts_with(".is_terminal()");
        !WRITERS.contains(&file)
            && code.match_indices(&format!("io::{name}")).any(|(at, found)| !asks(&code[at + found.len()..]))
    });
    macros.chain(streams).map(|what| format!("src/{file}: {what}")).collect()
}

#[test]
fn no_file_bypasses_the_writers_of_the_streams() {
    // These run elsewhere: in a test, or before the program is built.
    let elsewhere =
        |file: &str| file.ends_with("tests.rs") || file.ends_with("testing.rs") || file.ends_with("build.rs");
    let sources = sources();
    let ours = sources.iter().filter(|(file, _)| !elsewhere(file));
    let wrong: Vec<String> = ours.flat_map(|(file, text)| written_past_the_writers(file, text)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for text in [
        "fn f() { eprintln!(\"x\") }",
        "fn f() { std::println!() }",
        "fn f() { writeln!(io::stderr(), \"x\") }",
        "fn f() { std::io::stdout().lock() }",
    ] {
        assert_eq!(written_past_the_writers("agent/mod.rs", text).len(), 1, "{text}");
    }
    assert!(written_past_the_writers("agent/mod.rs", "fn f() { io::stderr().is_terminal() } // eprintln!").is_empty());
    assert!(written_past_the_writers("report/writer.rs", "fn f() { io::stderr() }").is_empty());
}

/// Rooms that must not import each other, whatever the order: (the importer, the imported).
const APART: [(&str, &str); 12] = [
    ("agent", "torch"),
    ("agent", "model"),
    ("agent", "data"),
    ("agent", "worker"),
    ("checkpoint", "torch"),
    ("snapshot", "storage"),
    ("worker", "storage"),
    ("worker", "agent"),
    ("train", "storage"),
    ("train", "agent"),
    ("train", "worker"),
    ("protocol", "config"),
];

#[test]
fn some_pairs_of_rooms_stay_apart() {
    for (file, text) in sources() {
        let own = file.split('/').next().unwrap_or_default().trim_end_matches(".rs");
        for name in named_modules(&code(&text)) {
            assert!(!APART.contains(&(own, name.as_str())), "src/{file} names crate::{name}");
        }
    }
    let named = named_modules("use crate::{error, storage::{Store, Crc64}};\nfn f(x: crate::torch::T) {}");
    assert_eq!(named, ["error", "storage", "torch"]);
}

/// Rooms whose `mod.rs` is a façade: it documents and re-exports, and their files import each other.
const FACADES: [&str; 2] = ["storage", "notice"];

/// Names that a file takes from its parent although no file beside it has them.
fn taken_from_the_facade(siblings: &[&str], text: &str) -> Vec<String> {
    named_after("super::", &code(text)).into_iter().filter(|name| !siblings.contains(&name.as_str())).collect()
}

/// Lines of a façade that are more than a module or a re-export.
fn more_than_a_facade(text: &str) -> Vec<&str> {
    let starts = ["//", "#", "mod ", "pub mod ", "pub(crate) mod ", "pub use self::"];
    text.lines()
        .filter(|line| !line.is_empty() && !line.starts_with([' ', '}']))
        .filter(|line| !starts.iter().any(|start| line.starts_with(start)))
        .collect()
}

#[test]
fn files_below_a_facade_import_each_other() {
    let sources = sources();
    for room in FACADES {
        let below = |file: &str| file.strip_prefix(room).and_then(|rest| rest.strip_prefix('/')).map(str::to_owned);
        let files: Vec<(String, &String)> =
            sources.iter().filter_map(|(file, text)| Some((below(file)?, text))).collect();
        let siblings: Vec<&str> = files.iter().map(|(file, _)| file.trim_end_matches(".rs")).collect();
        assert!(siblings.len() > 5, "{room}: {siblings:?}");
        for (file, text) in &files {
            if file == "mod.rs" {
                assert_eq!(more_than_a_facade(text), [""; 0], "src/{room}/mod.rs");
            } else if !file.ends_with("tests.rs") {
                assert_eq!(taken_from_the_facade(&siblings, text), [""; 0], "src/{room}/{file}");
            }
        }
    }
    assert_eq!(
        taken_from_the_facade(&["retry"], "use super::{Store, retry::Queue};\nfn f(x: super::X) {}"),
        ["Store", "X"]
    );
    assert!(
        taken_from_the_facade(&["retry"], "use super::retry;\n#[cfg(test)]\nmod tests {\n    use super::*;\n}")
            .is_empty()
    );
    assert_eq!(
        more_than_a_facade("//! x\nmod a;\npub use self::{\n    a::B,\n};\nuse std::io;\nfn f() {\n}"),
        ["use std::io;", "fn f() {"]
    );
}

/// Columns of a line, comments included.
const WIDTH: usize = 120;

/// Files with wider lines, and why.
const WIDER: [(&str, &str); 4] = [
    (
        "userdata/aws/stack.yaml",
        "it embeds user-data.sh line by line, policies, and lines of JSON, which can't be folded",
    ),
    ("userdata/aws/user-data.sh", "EC2 takes 16 KB: no line grows by its continuation"),
    ("benches/results/", "records, as the benchmark has written them"),
    ("userdata/grafana.json", "JSON breaks no string"),
];

/// Whether a line can't be broken: a row of a table, or one long word (a URL, a message of a protocol).
fn is_whole(line: &str) -> bool {
    let line = line.trim();
    let comment = line.trim_start_matches("//").trim_start_matches(['/', '!']).trim_start();
    let row = comment.starts_with('|') && comment.ends_with('|');
    row || line.split_whitespace().any(|word| word.chars().count() > 80)
}

fn too_wide(text: &str) -> Vec<usize> {
    let wide = |line: &str| line.chars().count() > WIDTH && !is_whole(line);
    text.lines().enumerate().filter(|(_, line)| wide(line)).map(|(at, _)| at + 1).collect()
}

/// Every file that people write and read as text: sources, manuals, settings, scripts.
fn texts() -> Vec<(String, String)> {
    fn walk(root: &Path, folder: &Path, found: &mut Vec<(String, String)>) {
        const OTHERS: [&str; 5] = [".git", ".libtorch", "target", "shared", "tests/fixtures"];
        const KINDS: [&str; 7] = ["rs", "md", "toml", "yaml", "yml", "py", "sh"];
        for entry in std::fs::read_dir(folder).expect("folder") {
            let path = entry.expect("entry").path();
            let name = path.strip_prefix(root).expect("below the root").display().to_string();
            if OTHERS.contains(&name.as_str()) || path.is_symlink() {
                continue;
            }
            let every = ["scripts/", ".ci/", "userdata/"].iter().any(|folder| name.starts_with(folder));
            let known = path.extension().is_some_and(|kind| KINDS.iter().any(|known| kind == *known));
            if path.is_dir() {
                walk(root, &path, found);
            } else if every || known {
                found.push((name, std::fs::read_to_string(&path).expect("read text")));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    walk(root, root, &mut found);
    found.sort();
    found
}

#[test]
fn no_line_is_wider_than_120_columns() {
    let texts = texts();
    for some in
        ["src/lib.rs", "README.md", "Cargo.toml", ".clippy.toml", "scripts/test", ".ci/run", "userdata/README.md"]
    {
        assert!(texts.iter().any(|(file, _)| file == some), "{some} is not looked at");
    }
    let wider = |file: &str| WIDER.iter().any(|(name, _)| file.starts_with(name));
    let looked_at = texts.iter().filter(|(file, _)| !wider(file));
    let wrong: Vec<String> = looked_at
        .flat_map(|(file, text)| too_wide(text).into_iter().map(move |line| format!("{file}:{line}")))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(too_wide(&format!("{}\n{}", "x y ".repeat(30), "é x ".repeat(31))), [2]);
    assert!(too_wide(&format!("    //! | {} |", "x ".repeat(100))).is_empty());
    assert!(too_wide(&format!("| {} |", "x ".repeat(100))).is_empty());
    assert_eq!(too_wide(&format!("    // {}", "x ".repeat(100))), [1]);
    assert!(too_wide(&format!("    // see https://{}", "x".repeat(120))).is_empty());
}

/// The most lines of code in one file.
const LENGTH: usize = 600;

/// Longer files, and why.
const LONGER: [(&str, &str); 3] = [
    ("tests/support/s3.rs", "one server: all operations share its state"),
    ("tests/protocol_model.rs", "a model is read as a whole: world, steps, invariants"),
    ("tests/members_model.rs", "a model is read as a whole: world, steps, invariants"),
];

/// Lines that hold code: no comment, not blank, not the unit tests at the foot.
fn lines_of_code(text: &str) -> usize {
    code(text).lines().filter(|line| !line.trim().is_empty()).count()
}

#[test]
fn no_file_has_more_than_600_lines_of_code() {
    for folder in ["src", "tests", "benches"] {
        for (file, text) in sources_below(folder) {
            let (file, count) = (format!("{folder}/{file}"), lines_of_code(&text));
            let longer = LONGER.iter().any(|(name, _)| file == *name);
            assert!(count <= LENGTH || longer, "{file} has {count} lines of code: split it");
        }
    }
    assert_eq!(lines_of_code("//! x\n\nfn f() {} // y\n\n#[cfg(test)]\nmod tests {\n    fn g() {}\n}"), 1);
}

/// Rooms that may have one name for several types, and why.
const NAMESAKES: [(&str, &str); 4] = [
    ("train", "each strategy has its own parts"),
    ("cli", "one file per subcommand, each with its own report"),
    ("cloud", "one file per service, each with its own answer"),
    ("notice", "one file per source, each with its own answer"),
];

/// The types that a file declares, those within functions and tests aside.
fn types(text: &str) -> Vec<String> {
    let declared = |line: &str| {
        let line =
            ["pub(super) ", "pub(crate) ", "pub "].iter().find_map(|start| line.strip_prefix(start)).unwrap_or(line);
        let kinds = ["struct ", "enum ", "union ", "trait ", "type "];
        let rest = kinds.iter().find_map(|kind| line.strip_prefix(kind))?;
        Some(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
    };
    code(text).lines().filter_map(declared).collect()
}

#[test]
fn no_room_has_two_types_of_one_name() {
    let for_tests = |file: &str| file.ends_with("tests.rs") || file.ends_with("testing.rs") || file.contains("/tests/");
    let mut declared: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for (file, text) in sources().into_iter().filter(|(file, _)| !for_tests(file)) {
        let room = file.split('/').next().unwrap_or_default().trim_end_matches(".rs").to_owned();
        for name in types(&text) {
            declared.entry((room.clone(), name)).or_default().push(file.clone());
        }
    }
    assert!(declared.len() > 300, "{} types", declared.len());
    let mut wrong = Vec::new();
    for ((room, name), files) in &declared {
        if files.len() > 1 && !NAMESAKES.iter().any(|(excepted, _)| room == excepted) {
            wrong.push(format!("{name}: {}", files.join(", ")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let text = "pub struct A<T>(T);\npub(super) enum B {\n}\nfn f() {\n    struct C;\n}\n// struct D;\ntrait E: F {}\n\
        type G = u8;";
    assert_eq!(types(text), ["A", "B", "E", "G"]);
}

/// Pauses whose length has no name. A name says what the code waits for, and its constant says why that long.
fn nameless_pauses(text: &str) -> usize {
    let starts = ["Duration::from", "std::time::Duration::from", "tokio::time::Duration::from"];
    let code = code(text);
    let number = |at: usize| starts.iter().any(|start| code[at..].trim_start().starts_with(start));
    code.match_indices("sleep(").filter(|(at, found)| number(at + found.len())).count()
}

#[test]
fn every_pause_has_a_name() {
    let wrong: Vec<String> =
        sources().into_iter().filter(|(_, text)| nameless_pauses(text) > 0).map(|(file, _)| file).collect();
    assert!(wrong.is_empty(), "a pause is written as a number: {wrong:?}");
    assert_eq!(nameless_pauses("fn f() { tokio::time::sleep(Duration::from_secs(2)).await }"), 1);
    assert_eq!(nameless_pauses("fn f() { std::thread::sleep(std::time::Duration::from_millis(50)) }"), 1);
    assert_eq!(nameless_pauses("fn f() { sleep(PAUSE * 2).await; sleep(pause) }"), 0);
}

#[test]
fn the_environment_is_read_in_one_place_that_says_what_each_variable_means() {
    let documented: Vec<&str> = trainer::env::OURS.iter().map(|(name, _)| *name).collect();
    assert!(documented.is_sorted(), "{documented:?}");
    let elsewhere = |file: &str| ["env.rs", "torch/build.rs"].contains(&file) || file.ends_with("tests.rs");
    for (file, text) in sources() {
        let code = code(&text);
        assert!(elsewhere(&file) || !code.contains("env::var"), "src/{file} reads the environment past src/env.rs");
        for (at, _) in code.match_indices("\"TRAINER_") {
            let name: String = code[at + 1..]
                .chars()
                .take_while(|c| c.is_ascii_uppercase() || *c == '_' || c.is_ascii_digit())
                .collect();
            let known = documented.contains(&name.as_str()) || name == "TRAINER_" || name.starts_with("TRAINER_TEST_");
            assert!(known || elsewhere(&file), "src/{file} names {name}, which src/env.rs does not explain");
        }
    }
}
