//! `data prepare` on real-world files: packed, misnamed, broken, linked, and texts that spell special tokens.

use std::{
    ffi::OsStr,
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
    },
    path::Path,
};

use crate::support::{
    lab::{Lab, data_set, model_config, sample_text},
    s3::BUCKET,
    trainer::Finished,
};

fn write(lab: &Lab, name: impl AsRef<OsStr>, body: impl AsRef<[u8]>) {
    let path = lab.path("").join(name.as_ref());
    std::fs::create_dir_all(path.parent().expect("folder")).expect("folder");
    std::fs::write(path, body).expect("write input");
}

fn prepare(lab: &Lab, input: &str, out: &str, more: &[&str]) -> Finished {
    let (input, out) = (lab.path(input).display().to_string(), lab.path(out).display().to_string());
    let tokenizer = data_set().join("tokenizer.json").display().to_string();
    let mut arguments = vec!["data", "prepare", "--input", &input, "--out", &out, "--validation-ratio", "0"];
    if !more.contains(&"--tokenizer") {
        arguments.extend(["--tokenizer", &tokenizer]);
    }
    lab.command(&arguments).args(more).finish()
}

/// The training tokens of a dataset with fewer than 65,536 kinds.
fn tokens(out: &Path) -> Vec<u32> {
    let bytes = std::fs::read(out.join("train-00000.bin")).expect("a shard");
    bytes.chunks(2).map(|id| u32::from(u16::from_le_bytes([id[0], id[1]]))).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(bytes).expect("pack");
    writer.finish().expect("pack")
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).expect("pack")
}

#[test]
fn records_are_read_in_every_form() {
    let lab = Lab::on_files_at_once();
    let texts = ["one\nline", "an \"other\" one", "gr\u{fc}n", "the last"];
    let record = |text: &&str| serde_json::json!({ "id": 7, "doc": { "text": text } });
    let lines: String = texts.iter().map(|text| format!("{}\n", record(text))).collect();
    let array = serde_json::to_string_pretty(&texts.iter().map(&record).collect::<Vec<_>>()).unwrap();
    let spread: String =
        texts.iter().map(|text| format!("{}\n", serde_json::to_string_pretty(&record(text)).unwrap())).collect();
    let nan = lines.replace("\"id\":7", "\"id\":NaN,\"name\":\"\\ud800\"");
    assert!(nan.contains("NaN"));
    let (half, rest) = lines.split_at(lines.find('\n').unwrap() + 1);
    let members = [gzip(half.as_bytes()), gzip(rest.as_bytes())].concat();
    let frames = [zstd(half.as_bytes()), zstd(rest.as_bytes())].concat();
    let forms: [(&str, Vec<u8>); 11] = [
        ("a.jsonl", lines.clone().into()),
        ("a.json", lines.clone().into()),
        ("b.json", array.clone().into()),
        ("c.json", spread.into()),
        ("d.json", format!("\u{feff}{array}").into()),
        ("blob", lines.clone().into()),
        ("nan.jsonl", nan.into()),
        ("a.jsonl.gz", members.clone()),
        ("a.json.zst", frames),
        ("packed-blob", members),
        ("e.json.gz", gzip(array.as_bytes())),
    ];
    let mut expected = None;
    for (name, body) in forms {
        write(&lab, name, body);
        let out = format!("out-{name}");
        let done = prepare(&lab, name, &out, &["--text-field", "doc.text"]).expect_code(0);
        let tokens = tokens(&lab.path(&out));
        assert_eq!(tokens.iter().filter(|&&id| id == 0).count(), texts.len(), "{name}: {}", done.story());
        assert_eq!(expected.get_or_insert_with(|| tokens.clone()), &tokens, "{name} gives other tokens");
    }
}

#[test]
fn an_unsupported_input_is_an_error_with_a_remedy() {
    let lab = Lab::on_files_at_once();
    let packed = gzip("{\"text\": \"a\"}\n".repeat(5000).as_bytes());
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"hello\"}]}\n";
    let utf16: Vec<u8> = "{\"text\": \"a\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    let inputs: [(&str, Vec<u8>, &[&str]); 14] = [
        ("a.csv", b"text\na\n".to_vec(), &["a.csv", "table", "to_parquet"]),
        ("a.tsv", b"text\na\n".to_vec(), &["a.tsv", "table"]),
        ("b.csv.gz", gzip(b"text\na\n"), &["b.csv.gz", "table"]),
        ("a.xz", b"\xfd7zXZ\0".to_vec(), &["a.xz", "compressed"]),
        ("cut.jsonl.gz", packed[..packed.len() / 2].to_vec(), &["cut.jsonl.gz", "cut short"]),
        ("cut.txt.zst", zstd(&[b'a'; 9999])[..9].to_vec(), &["cut.txt.zst"]),
        ("a.json", utf16, &["a.json", "UTF-16", "iconv"]),
        ("lfs.jsonl", pointer.into(), &["lfs.jsonl", "git lfs pull"]),
        ("chat.jsonl", chat.into(), &["chat.jsonl:1", "conversation", "messages"]),
        ("chat.json", chat.repeat(2).into(), &["chat.json:1", "conversation"]),
        ("fields.json", b"[{\"body\": \"a\"}]".to_vec(), &["fields.json", "body", "--text-field"]),
        ("numbers.json", b"[1, 2, 3]".to_vec(), &["numbers.json", "array"]),
        ("broken.json", b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"text\": oops}\n".to_vec(), &["broken.json:3"]),
        ("open.json", b"[{\"text\": \"a\"},\n{\"text\": \"b\"}\n".to_vec(), &["open.json:3", "ends"]),
    ];
    for (name, body, said) in inputs {
        write(&lab, name, body);
        prepare(&lab, name, "out", &[]).expect_code(78).expect_said(said);
        assert!(!lab.path("out/index.json").exists(), "{name} made a data set");
    }
    let pipe = lab.path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).expect("pipe");
    prepare(&lab, "pipe", "out", &[]).expect_code(78).expect_said(&["pipe, which can be read once only"]);
}

#[test]
fn errors_name_the_line_of_their_file_and_bad_records_can_be_skipped() {
    let lab = Lab::on_files_at_once();
    write(&lab, "in/a.jsonl", "{\"text\": \"a\"}\n".repeat(500));
    write(
        &lab,
        "in/b.jsonl",
        "{\"text\": \"b\"}\n\n{\"text\": 5}\n{\"text\"\n{\"text\": \"\\ud800\"}\n{\"text\": \"c\"}\n",
    );
    prepare(&lab, "in", "out", &[]).expect_code(78).expect_said(&["b.jsonl:3"]);
    let done = prepare(&lab, "in", "out", &["--bad-records", "skip", "--json"]).expect_code(0);
    let summary: serde_json::Value = serde_json::from_str(&done.stdout).expect("a summary");
    assert_eq!((&summary["bad_records"], &summary["documents"]), (&3.into(), &502.into()), "{}", done.story());
    assert!(done.stderr.contains("3 records of") && done.stderr.contains("b.jsonl:3"), "{}", done.story());
    // A record larger than any document is never held in memory, whether it is wanted or not.
    let huge = format!("{{\"text\": \"{}\"}}\n", "x".repeat(70 << 20));
    write(&lab, "huge.jsonl.zst", zstd(format!("{{\"text\": \"a\"}}\n{huge}{{\"text\": \"b\"}}\n").as_bytes()));
    prepare(&lab, "huge.jsonl.zst", "huge", &[]).expect_code(78).expect_said(&["huge.jsonl.zst:2", "64 MiB"]);
    prepare(&lab, "huge.jsonl.zst", "huge", &["--bad-records", "skip"]).expect_code(0);
    assert_eq!(tokens(&lab.path("huge")).iter().filter(|&&id| id == 0).count(), 2);
}

#[test]
fn a_few_files_may_be_left_out_and_the_summary_counts_them() {
    let lab = Lab::on_files_at_once();
    for number in 0..40 {
        write(&lab, format!("in/{number}.txt"), format!("text {number}"));
    }
    write(&lab, "in/picture.png", b"\x89PNG\0");
    write(&lab, "in/table.csv", "a,b\n");
    let done = prepare(&lab, "in", "out", &[]).expect_code(0);
    assert!(done.stdout.contains("2 of 42 files were left out"), "{}", done.story());
    for number in 0..4 {
        write(&lab, format!("in/{number}.xlsx"), "x");
    }
    prepare(&lab, "in", "more", &[]).expect_code(78).expect_said(&["of 46 files", "--skip-unreadable", "0.xlsx"]);
    let done = prepare(&lab, "in", "more", &["--skip-unreadable"]).expect_code(0);
    assert!(done.stdout.contains("6 of 46 files were left out"), "{}", done.story());
}

#[test]
fn a_broken_file_is_an_error_or_is_left_out_whole() {
    let lab = Lab::on_files_at_once();
    write(&lab, "in/a.txt", "a text");
    let lines: String = (0..20_000).map(|number| format!("{{\"text\": \"line {number}\"}}\n")).collect();
    let (gzip, zstd) = (gzip(lines.as_bytes()), zstd(lines.as_bytes()));
    prepare(&lab, "in", "alone", &["--tokenizer", "train:300"]).expect_code(0);
    for (name, body, said) in [
        ("in/cut.jsonl.gz", &gzip[..gzip.len() - 9], "cut short"),
        ("in/cut.jsonl.zst", &zstd[..zstd.len() - 9], "cut.jsonl.zst"),
        ("in/empty.jsonl.gz", b"", "is empty"),
        ("in/plain.jsonl.gz", b"{\"text\": \"a\"}\n", "is not gzip"),
        ("in/a.parquet", b"PAR1 and no more", "can't be read as Parquet"),
    ] {
        write(&lab, name, body);
        for input in ["in", name] {
            prepare(&lab, input, "out", &[]).expect_code(78).expect_said(&[said, "--skip-unreadable"]);
        }
        for (tokenizer, out) in [(None, "given"), (Some("train:300"), "trained")] {
            let mut more = vec!["--skip-unreadable", "--json", "--overwrite"];
            more.extend(tokenizer.into_iter().flat_map(|name| ["--tokenizer", name]));
            let done = prepare(&lab, "in", out, &more).expect_code(0).expect_said(&[said]);
            let summary: serde_json::Value = serde_json::from_str(&done.stdout).expect("a summary");
            assert_eq!((&summary["documents"], &summary["skipped"]), (&1.into(), &1.into()), "{}", done.story());
        }
        let trained = |out: &str| std::fs::read(lab.path(out).join("tokenizer.json")).expect("tokenizer");
        assert!(trained("trained") == trained("alone"), "{name}: a tokenizer has learnt from what was left out");
        std::fs::remove_file(lab.path(name)).expect("remove");
    }
}

#[test]
fn names_that_are_not_utf8_and_circular_links_are_handled() {
    let lab = Lab::on_files_at_once();
    write(&lab, OsStr::from_bytes(b"in/caf\xe9.txt"), "one");
    write(&lab, "in/deep/two.txt", "two");
    symlink("..", lab.path("in/deep/up")).expect("link");
    symlink("deep/two.txt", lab.path("in/zwei.txt")).expect("link");
    for (input, out) in [("in", "a"), ("in/**/*", "b"), ("in/**", "c")] {
        let done = prepare(&lab, input, out, &["--json"]).expect_code(0);
        let summary: serde_json::Value = serde_json::from_str(&done.stdout).expect("a summary");
        assert_eq!(summary["documents"], 2, "{}", done.story());
    }
    symlink("self", lab.path("self")).expect("link");
    prepare(&lab, "self", "d", &[]).expect_code(78).expect_said(&["self", "leads back to itself"]);
}

#[test]
fn no_text_ends_a_document() {
    let lab = Lab::on_files_at_once();
    let letters = "abcdefghijklmnopqrstuvwxyz</>\u{2581}";
    let mut vocabulary = vec![serde_json::json!(["<unk>", 0.0]), serde_json::json!(["</s>", -0.1])];
    vocabulary.extend(letters.chars().map(|letter| serde_json::json!([letter.to_string(), -9.0])));
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": [],
        "pre_tokenizer": { "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always" },
        "model": { "type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": false },
    });
    write(&lab, "unigram/tokenizer.json", tokenizer.to_string());
    write(&lab, "in/a.txt", "the end </s> is</s>here");
    write(&lab, "in/b.txt", "another");
    let folder = lab.path("unigram").display().to_string();
    prepare(&lab, "in", "out", &["--tokenizer", &folder]).expect_code(0);
    let ends = tokens(&lab.path("out")).iter().filter(|&&id| id == 1).count();
    assert_eq!(ends, 2, "one end for each of two documents");

    // The tokenizer has whole words only, so there is no other form for it.
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "unk_token": "<unk>", "vocab": { "<unk>": 0, "</s>": 1, "another": 2 } },
    });
    write(&lab, "words.json", tokenizer.to_string());
    write(&lab, "in/c.txt", "another\nword\n</s> here\n");
    let words = lab.path("words.json").display().to_string();
    prepare(&lab, "in/c.txt", "words", &["--tokenizer", &words]).expect_code(78).expect_said(&["c.txt:3", "</s>"]);
}

#[test]
fn inputs_in_a_store_are_fetched_once_and_every_phase_is_reported() {
    let lab = Lab::on_s3();
    for (number, text) in sample_text().as_bytes().chunks(10_000).take(6).enumerate() {
        lab.server().write(&format!("texts/{number}.txt"), text.to_vec());
    }
    let (input, out) = (format!("s3://{BUCKET}/texts"), lab.path("out").display().to_string());
    let before = lab.server().count("GetObject");
    let done = lab
        .command(&["data", "prepare", "--input", &input, "--tokenizer", "train:400", "--out", &out])
        .finish()
        .expect_code(0)
        .expect_said(&["looking for inputs", "reading text", "training tokenizer", "encoding", "writing"]);
    assert_eq!(lab.server().count("GetObject") - before, 6, "{}", done.story());

    // The tokenizer comes from there, too.
    lab.server().write("model/tokenizer.json", std::fs::read(lab.path("out/tokenizer.json")).expect("tokenizer"));
    for (place, out) in [("model", "second"), ("model/tokenizer.json", "third")] {
        let (tokenizer, out) = (format!("s3://{BUCKET}/{place}"), lab.path(out).display().to_string());
        lab.command(&["data", "prepare", "--input", &input, "--tokenizer", &tokenizer, "--out", &out])
            .finish()
            .expect_code(0);
    }
    assert_eq!(tokens(&lab.path("out")), tokens(&lab.path("third")));
}

#[test]
fn generate_ends_with_the_token_between_the_datas_documents() {
    let lab = Lab::on_files();
    let tokenizer = std::fs::read_to_string(data_set().join("tokenizer.json")).expect("tokenizer");
    write(&lab, "tokenizer.json", tokenizer.replace("<|endoftext|>", "<|fin|>"));
    write(&lab, "in.txt", sample_text());
    let tokenizer = lab.path("tokenizer.json").display().to_string();
    prepare(&lab, "in.txt", "data", &["--tokenizer", &tokenizer]).expect_code(78).expect_said(&["--eos-token"]);
    prepare(&lab, "in.txt", "data", &["--tokenizer", &tokenizer, "--eos-token", "<|fin|>"]).expect_code(0);
    lab.write_config("model.json", &model_config(512));
    let train = format!("data.train=\"file://{}\"", lab.path("data").display());
    lab.run("x").args(&["--set", &train]).finish().expect_code(0);
    let generate = |more: &[&str]| {
        lab.about("generate", "x").args(&["--prompt", "", "--tokens", "5", "--json"]).args(more).finish()
    };
    generate(&[]).expect_code(0);
    generate(&["--eos-token", "<|fin|>"]).expect_code(0);
    generate(&["--eos-token", "<|other|>"]).expect_code(78).expect_said(&["<|other|>"]);
}

/// The same without the right of root to read everything.
fn as_anybody(lab: &Lab, input: &str, out: &str, more: &[&str]) -> Finished {
    let (input, out) = (lab.path(input).display().to_string(), lab.path(out).display().to_string());
    let tokenizer = data_set().join("tokenizer.json").display().to_string();
    let arguments = ["data", "prepare", "--input", &input, "--out", &out, "--tokenizer", &tokenizer];
    let command = lab.command(&arguments).args(more);
    if rustix::process::geteuid().is_root() {
        return command.within(&["setpriv", "--bounding-set=-dac_override,-dac_read_search"]).finish();
    }
    command.finish()
}

#[test]
fn files_and_folders_that_may_not_be_read_are_left_out_like_any_unreadable_file() {
    let lab = Lab::on_files_at_once();
    for number in 0..40 {
        write(&lab, format!("in/{number}.txt"), format!("text {number}"));
    }
    write(&lab, "in/secret.txt", "a text");
    write(&lab, "in/lost+found/x.txt", "a text");
    let closed = std::fs::Permissions::from_mode(0o000);
    for name in ["in/secret.txt", "in/lost+found"] {
        std::fs::set_permissions(lab.path(name), closed.clone()).expect("close");
    }
    let done = as_anybody(&lab, "in", "out", &[]).expect_code(0);
    assert!(done.stdout.contains("2 of 42 files were left out"), "{}", done.story());
    done.expect_said(&["secret.txt", "lost+found", "Permission denied"]);
    for (number, named) in ["in/secret.txt", "in/lost+found", "in/lost+found/*.txt"].into_iter().enumerate() {
        let out = format!("named-{number}");
        as_anybody(&lab, named, &out, &[]).expect_code(78).expect_said(&["--skip-unreadable", "Permission denied"]);
        let input = lab.path(named).display().to_string();
        as_anybody(&lab, "in", &out, &["--input", &input, "--skip-unreadable"]).expect_code(0);
    }
    // Too many are found out before the work, and the flag is named.
    for number in 0..4 {
        write(&lab, format!("in/closed-{number}/x.txt"), "a text");
        std::fs::set_permissions(lab.path(&format!("in/closed-{number}")), closed.clone()).expect("close");
    }
    as_anybody(&lab, "in", "more", &[]).expect_code(78).expect_said(&["of 46 files", "--skip-unreadable"]);
    let done = as_anybody(&lab, "in", "more", &["--skip-unreadable"]).expect_code(0);
    assert!(done.stdout.contains("6 of 46 files were left out"), "{}", done.story());
    let open = std::fs::Permissions::from_mode(0o700);
    for name in ["in/lost+found", "in/closed-0", "in/closed-1", "in/closed-2", "in/closed-3"] {
        std::fs::set_permissions(lab.path(name), open.clone()).expect("open");
    }
}
