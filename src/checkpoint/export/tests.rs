use std::{collections::BTreeMap, fs};

use super::*;
use crate::{
    checkpoint::{
        catalog,
        restore::weights_from_folder,
        save::Upload,
        testing::{HARMS, Tensor, checkpoint, commit, file, file_store, harm, memory_store, random, save, weights},
    },
    format::{convert, header, slices},
};

#[tokio::test]
async fn exports_of_equal_weights_are_equal_whatever_the_world_size() {
    let folder = tempfile::tempdir().unwrap();
    let mut first: Option<Vec<u8>> = None;
    for ranks in 1..=4 {
        let store = memory_store();
        let (_, manifest) = checkpoint(&store, 5, 1, ranks, 9).await;
        for part in [100, 4096, 1 << 20] {
            let out = folder.path().join(format!("deep/model-{ranks}-{part}"));
            let seen = Mutex::new(0);
            let heard = |n| *seen.lock().unwrap() += n;
            let exported =
                export(&store, &manifest, &Target::Folder(out.clone()), &Form::plain(part), heard).await.unwrap();
            let model = fs::read(out.join(layout::MODEL)).unwrap();
            assert_eq!(exported.bytes, model.len() as u64);
            let shards = manifest.files.iter().filter(|file| file.kind == FileKind::Model);
            assert_eq!(*seen.lock().unwrap(), shards.map(|file| file.bytes).sum::<u64>());
            assert_eq!(fs::read(out.join(layout::MODEL_CONFIG)).unwrap(), b"{\"model_type\":\"llama\"}");
            assert_eq!(fs::read_dir(&out).unwrap().count(), 3);
            assert_eq!(*first.get_or_insert_with(|| model.clone()), model, "{ranks} ranks, parts of {part}");
        }
        let to = memory_store();
        export(&store, &manifest, &Target::Store(to.clone()), &Form::plain(500), |_| {}).await.unwrap();
        assert_eq!(Some(to.get(layout::MODEL, u64::MAX).await.unwrap().to_vec()), first);
        assert!(to.head(layout::MODEL_CONFIG).await.is_ok());
    }
    // Nothing half-made is left beside the folders.
    assert_eq!(fs::read_dir(folder.path().join("deep")).unwrap().count(), 12);
    let model = first.unwrap();
    let read = safetensors::SafeTensors::deserialize(&model).unwrap();
    for tensor in weights(9) {
        assert_eq!(read.tensor(&tensor.name).unwrap().data(), tensor.bytes, "{}", tensor.name);
    }
    assert_eq!(read.len(), weights(9).len());
}

#[tokio::test]
async fn a_damaged_shard_is_named_and_no_files_stay() {
    for how in HARMS {
        let (_guard, store) = file_store();
        let (_, manifest) = checkpoint(&store, 5, 1, 2, 9).await;
        let key = harm(&store, &manifest.folder(), "model-00002-of-00002.safetensors", how).await;
        let folder = tempfile::tempdir().unwrap();
        let target = Target::Folder(folder.path().join("model"));
        let error = export(&store, &manifest, &target, &Form::plain(1000), |_| {}).await.unwrap_err();
        assert!(matches!(&error, CheckpointError::Damaged { object, .. } if *object == key), "{how:?}: {error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{how:?}");
    }
}

#[tokio::test]
async fn a_folder_that_is_not_empty_is_left_alone() {
    let store = memory_store();
    let (_, manifest) = checkpoint(&store, 5, 1, 1, 9).await;
    let folder = tempfile::tempdir().unwrap();
    let (full, file, empty) = (folder.path().join("full"), folder.path().join("file"), folder.path().join("empty"));
    fs::create_dir(&full).unwrap();
    fs::create_dir(&empty).unwrap();
    fs::write(full.join("notes.txt"), "mine").unwrap();
    fs::write(&file, "mine").unwrap();
    for path in [full, file] {
        let error = export(&store, &manifest, &Target::Folder(path), &Form::plain(1000), |_| {}).await.unwrap_err();
        assert!(matches!(error, CheckpointError::Occupied { .. }), "{error}");
    }
    export(&store, &manifest, &Target::Folder(empty.clone()), &Form::plain(1000), |_| {}).await.unwrap();
    assert!(empty.join(layout::MODEL).exists());
    assert_eq!(fs::read_to_string(folder.path().join("full/notes.txt")).unwrap(), "mine");
}

/// The tensors of safetensors files by name: type, shape and bytes.
fn tensors<'a>(files: impl IntoIterator<Item = &'a Bytes>) -> BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for bytes in files {
        for tensor in header::read(bytes).unwrap() {
            let data = bytes[tensor.range.start as usize..tensor.range.end as usize].to_vec();
            assert!(found.insert(tensor.name, (tensor.dtype, tensor.shape, data)).is_none(), "a tensor is there twice");
        }
    }
    found
}

/// All files of a folder of a store.
async fn all(store: &Store) -> BTreeMap<String, Bytes> {
    let mut files = BTreeMap::new();
    for info in store.list("").await.unwrap() {
        files.insert(info.key.clone(), store.get(&info.key, u64::MAX).await.unwrap());
    }
    files
}

fn is_weights(name: &str) -> bool {
    name.ends_with(layout::SAFETENSORS)
}

#[tokio::test]
async fn more_weights_than_fit_one_file_are_split_with_an_index() {
    let (one, folder) = (memory_store(), tempfile::tempdir().unwrap());
    let (_, manifest) = checkpoint(&one, 5, 1, 1, 9).await;
    let to = memory_store();
    export(&one, &manifest, &Target::Store(to.clone()), &Form::plain(500), |_| {}).await.unwrap();
    let whole = all(&to).await;
    let expected = tensors([&whole[layout::MODEL]]);
    let total: usize = expected.values().map(|(_, _, bytes)| bytes.len()).sum();
    // Each tensor apart; the two large ones apart and the small ones together; all but the last byte together.
    for (max, count) in [(1, 6), (12_600, 3), (total as u64 - 1, 2), (total as u64, 1)] {
        let form = Form { max_shard: max, ..Form::plain(1000) };
        let mut first = None;
        for ranks in 1..=3 {
            let store = memory_store();
            let (_, manifest) = checkpoint(&store, 5, 1, ranks, 9).await;
            let out = folder.path().join(format!("{max}-{ranks}"));
            let exported = export(&store, &manifest, &Target::Folder(out.clone()), &form, |_| {}).await.unwrap();
            let to = memory_store();
            let same = export(&store, &manifest, &Target::Store(to.clone()), &form, |_| {}).await.unwrap();
            assert_eq!(exported, same);
            let files = all(&to).await;
            assert_eq!(files.len(), exported.files.len());
            for (name, bytes) in &files {
                assert_eq!(fs::read(out.join(name)).unwrap(), *bytes, "{name}");
            }
            let shards: BTreeMap<&String, &Bytes> = files.iter().filter(|(name, _)| is_weights(name)).collect();
            assert_eq!(shards.len(), count, "{max}");
            assert_eq!(exported.bytes, shards.values().map(|bytes| bytes.len() as u64).sum::<u64>());
            assert_eq!(tensors(shards.values().copied()), expected, "{max}");
            let found = weights_from_folder(&to).await.unwrap();
            assert_eq!(
                found.iter().map(|file| &file.name).collect::<Vec<_>>(),
                shards.keys().copied().collect::<Vec<_>>()
            );
            if count > 1 {
                let index: serde_json::Value = serde_json::from_slice(&files[layout::MODEL_INDEX]).unwrap();
                assert_eq!(index["metadata"]["total_size"], total);
                let map = index["weight_map"].as_object().unwrap();
                assert_eq!(map.len(), expected.len());
                for (number, (name, bytes)) in shards.iter().enumerate() {
                    assert_eq!(**name, format!("model-{:05}-of-{count:05}.safetensors", number + 1));
                    let held = tensors([*bytes]);
                    let size: usize = held.values().map(|(_, _, bytes)| bytes.len()).sum();
                    assert!(size as u64 <= max || held.len() == 1, "{name} has {size} bytes");
                    held.keys().for_each(|tensor| assert_eq!(map[tensor], **name));
                }
            } else {
                assert!(!files.contains_key(layout::MODEL_INDEX));
                assert_eq!(files, whole);
            }
            assert_eq!(*first.get_or_insert_with(|| files.clone()), files, "{ranks} ranks");
        }
    }
}

#[tokio::test]
async fn an_earlier_export_in_a_store_is_replaced_and_what_is_not_of_an_export_stays() {
    let store = memory_store();
    let (_, manifest) = checkpoint(&store, 5, 1, 2, 9).await;
    let to = memory_store();
    let target = Target::Store(to.clone());
    for name in ["README.md", "model-00001-of-00009.safetensors.bak", "nested/model.safetensors"] {
        to.put(name, "mine".into()).await.unwrap();
    }
    to.put("chat_template.jinja", "of another model".into()).await.unwrap();
    let apart = Form { max_shard: 1, ..Form::plain(1000) };
    for (form, weights) in [(apart, 6), (Form::plain(1000), 1), (apart, 6)] {
        let exported = export(&store, &manifest, &target, &form, |_| {}).await.unwrap();
        let mut expected = exported.files;
        expected.extend(
            ["README.md", "model-00001-of-00009.safetensors.bak", "nested/model.safetensors"].map(str::to_owned),
        );
        expected.sort_unstable();
        assert_eq!(all(&to).await.into_keys().collect::<Vec<_>>(), expected);
        assert_eq!(weights_from_folder(&to).await.unwrap().len(), weights);
    }
}

#[tokio::test]
async fn a_broken_off_export_to_a_store_leaves_nothing_that_looks_complete() {
    let store = memory_store();
    let (_, manifest) = checkpoint(&store, 5, 1, 2, 9).await;
    let to = memory_store();
    let target = Target::Store(to.clone());
    let form = Form { max_shard: 12_600, ..Form::plain(1000) };
    export(&store, &manifest, &target, &form, |_| {}).await.unwrap();
    assert!(to.head(layout::MODEL_CONFIG).await.is_ok());
    // Its last byte is wrong: most shards of the export are written when that shows.
    harm(&store, &manifest.folder(), "model-00002-of-00002.safetensors", crate::checkpoint::testing::Harm::Flip).await;
    export(&store, &manifest, &target, &form, |_| {}).await.unwrap_err();
    for name in [layout::MODEL_CONFIG, layout::MODEL_INDEX, layout::MODEL] {
        assert!(to.head(name).await.is_err(), "{name}");
    }
    assert!(weights_from_folder(&to).await.is_err());
    assert!(to.head("model-00001-of-00003.safetensors").await.is_ok());
}

#[tokio::test]
async fn a_checkpoint_is_not_overwritten_by_an_export() {
    let store = memory_store();
    let (_, manifest) = checkpoint(&store, 5, 1, 2, 9).await;
    let folder = store.folder(&manifest.folder());
    let before = all(&folder).await;
    let target = Target::Store(folder.clone());
    let error = export(&store, &manifest, &target, &Form::plain(1000), |_| {}).await.unwrap_err();
    assert!(matches!(error, CheckpointError::IsACheckpoint { .. }), "{error}");
    assert_eq!(all(&folder).await, before);
}

/// A checkpoint of rounded weights whose fp32 values are in slices, over two files of moments; and those values.
async fn rounded(store: &Store, change: impl FnOnce(&mut Vec<Upload>)) -> (Manifest, Vec<Tensor>) {
    let mut state = 77;
    let shapes: [(&str, &[u64]); 3] = [("a.weight", &[40, 3]), ("b.weight", &[7]), ("frozen.weight", &[5])];
    let fp32 = shapes.map(|(name, shape)| {
        let elements: u64 = shape.iter().product();
        let bytes = (0..elements).flat_map(|_| ((random(&mut state) % 2000) as f32 / 999.0 - 1.0).to_le_bytes());
        Tensor { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), bytes: bytes.collect() }
    });
    let bf16 = fp32.each_ref().map(|tensor| {
        let bytes = convert::convert(&tensor.bytes, Dtype::F32, Dtype::BF16).unwrap();
        Tensor { dtype: Dtype::BF16, bytes, ..tensor.clone() }
    });
    let slice = |of: &Tensor, begin: u64, end: u64| {
        let all = of.bytes.len() as u64 / 4;
        let name = slices::stored_name(&format!("master.{}", of.name), &(begin..end), all);
        let shape = if end - begin == all { of.shape.clone() } else { vec![end - begin] };
        Tensor { name, dtype: Dtype::F32, shape, bytes: of.bytes[begin as usize * 4..end as usize * 4].to_vec() }
    };
    let moments = |of: &Tensor| Tensor { name: format!("exp_avg.{}", of.name), ..of.clone() };
    let [a, b, _] = &fp32;
    let files =
        [vec![moments(a), slice(a, 50, 120), slice(b, 0, 3)], vec![slice(b, 3, 7), moments(b), slice(a, 0, 50)]];
    let mut save = save(5, 1, 1, 9);
    let name = |stem: &str, number: usize, of: usize| format!("{stem}-{number:05}-of-{of:05}.safetensors");
    save.uploads = vec![Upload { name: name("model", 1, 1), kind: FileKind::Model, body: file(&bf16) }];
    for (number, tensors) in files.iter().enumerate() {
        let name = name("optimizer", number + 1, 2);
        save.uploads.push(Upload { name, kind: FileKind::Optimizer, body: file(tensors) });
    }
    change(&mut save.uploads);
    let committed = commit(store, &save).await;
    (catalog::inspect(store, &committed).await.unwrap(), fp32.to_vec())
}

#[tokio::test]
async fn fp32_is_what_the_run_trains_and_bf16_is_rounded_once() {
    for part in [8, 13, 100, 1 << 20] {
        let store = memory_store();
        let (manifest, fp32) = rounded(&store, |_| {}).await;
        let get = |dtype: Option<Dtype>| {
            let (store, manifest) = (store.clone(), manifest.clone());
            async move {
                let to = memory_store();
                let form = Form { dtype, ..Form::plain(part) };
                let exported = export(&store, &manifest, &Target::Store(to.clone()), &form, |_| {}).await.unwrap();
                let files = all(&to).await;
                let config: serde_json::Value = serde_json::from_slice(&files[layout::MODEL_CONFIG]).unwrap();
                let name = exported.dtype.unwrap();
                assert_eq!([&config["dtype"], &config["torch_dtype"]], [name, name]);
                assert_eq!(config["model_type"], "llama");
                (tensors([&files[layout::MODEL]]), exported)
            }
        };
        let (full, exported) = get(Some(Dtype::F32)).await;
        assert_eq!(exported.dtype, Some("float32"));
        assert_eq!(exported.origins, Origins { masters: 2, widened: 1, rounded: 0 });
        let (stored, exported) = get(None).await;
        assert_eq!((exported.dtype, exported.origins), (Some("bfloat16"), Origins::default()));
        let (narrow, exported) = get(Some(Dtype::BF16)).await;
        assert_eq!((exported.dtype, exported.origins), (Some("bfloat16"), Origins::default()));
        assert_eq!(narrow, stored, "the stored weights are the trained ones, rounded once");
        for tensor in &fp32 {
            let rounded = convert::convert(&tensor.bytes, Dtype::F32, Dtype::BF16).unwrap();
            let wide = convert::convert(&rounded, Dtype::BF16, Dtype::F32).unwrap();
            let expected = if tensor.name == "frozen.weight" { &wide } else { &tensor.bytes };
            assert!(full[&tensor.name] == (Dtype::F32, tensor.shape.clone(), expected.clone()), "{}", tensor.name);
            assert_eq!(stored[&tensor.name].2, rounded);
        }
    }
}

#[tokio::test]
async fn weights_of_several_types_become_one_and_whole_numbers_stay() {
    let store = memory_store();
    let (_, manifest) = checkpoint(&store, 5, 1, 2, 9).await;
    for (asked, rounded, widened) in [(Dtype::BF16, 4, 0), (Dtype::F32, 0, 1)] {
        let to = memory_store();
        let form = Form { dtype: Some(asked), ..Form::plain(64) };
        let exported = export(&store, &manifest, &Target::Store(to.clone()), &form, |_| {}).await.unwrap();
        assert_eq!((exported.dtype, exported.origins), (None, Origins { masters: 0, widened, rounded }));
        let files = all(&to).await;
        assert_eq!(files[layout::MODEL_CONFIG], "{\"model_type\":\"llama\"}", "not one type: it stays as it is");
        let found = tensors([&files[layout::MODEL]]);
        for Tensor { name, dtype, shape, bytes } in weights(9) {
            let written = if dtype == Dtype::I64 { dtype } else { asked };
            assert!(found[&name] == (written, shape, convert::convert(&bytes, dtype, written).unwrap()), "{name}");
        }
    }
}

#[tokio::test]
async fn fp32_values_that_are_damaged_or_not_complete_are_refused() {
    let fp32 = Form { dtype: Some(Dtype::F32), ..Form::plain(50) };
    // The moments beside them are damaged: the file is, as a whole.
    let store = memory_store();
    let (manifest, _) = rounded(&store, |_| {}).await;
    let name = "optimizer-00001-of-00002.safetensors";
    let key = harm(&store, &manifest.folder(), name, crate::checkpoint::testing::Harm::Flip).await;
    let folder = tempfile::tempdir().unwrap();
    let target = Target::Folder(folder.path().join("model"));
    let error = export(&store, &manifest, &target, &fp32, |_| {}).await.unwrap_err();
    assert!(matches!(&error, CheckpointError::Damaged { object, .. } if *object == key), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    export(&store, &manifest, &target, &Form::plain(50), |_| {}).await.unwrap();

    let other = Target::Folder(folder.path().join("other"));
    let store = memory_store();
    let (manifest, _) = rounded(&store, |uploads| drop(uploads.pop())).await;
    let error = export(&store, &manifest, &other, &fp32, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("master.") && error.to_string().contains("lacks its elements"), "{error}");
    let store = memory_store();
    let (manifest, _) = rounded(&store, |uploads| {
        let again = uploads[1].body.clone();
        uploads.push(Upload {
            name: "optimizer-00003-of-00003.safetensors".into(),
            kind: FileKind::Optimizer,
            body: again,
        });
    })
    .await;
    let error = export(&store, &manifest, &other, &fp32, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("twice"), "{error}");
}

/// Doubles one tensor.
struct Double;

impl Change for Double {
    fn concerns(&self, name: &str) -> bool {
        name == "a.weight"
    }
    fn apply(&self, _: &str, shape: &[u64], bytes: &[u8], stored: Dtype, written: Dtype) -> Result<Vec<u8>, String> {
        assert_eq!((shape, stored), (&[40, 3][..], Dtype::BF16));
        let values = convert::convert(bytes, stored, Dtype::F32).unwrap();
        let doubled = values.chunks(4).map(|x| 2.0 * f32::from_le_bytes(x.try_into().unwrap()));
        let doubled: Vec<u8> = doubled.flat_map(f32::to_le_bytes).collect();
        Ok(convert::convert(&doubled, Dtype::F32, written).unwrap())
    }
}

#[tokio::test]
async fn a_changed_folder_has_the_tensors_of_the_model_and_is_verified() {
    let store = memory_store();
    let (manifest, _) = rounded(&store, |_| {}).await;
    let folder = store.folder(&manifest.folder());
    let entry = RemoteFile::from(manifest.files.iter().find(|file| file.kind == FileKind::Model).unwrap());
    let wanted = [("a.weight".to_owned(), vec![40, 3]), ("b.weight".to_owned(), vec![7])];
    let stored = tensors([&folder.get(&entry.name, u64::MAX).await.unwrap()]);
    for (dtype, max_shard) in [(Dtype::F32, u64::MAX), (Dtype::BF16, 1)] {
        let to = memory_store();
        let form = Form { dtype: Some(dtype), max_shard, part: 30 };
        let small = vec![(layout::MODEL_CONFIG.to_owned(), Bytes::from_static(b"{}"))];
        let base = (&folder, vec![entry.clone()]);
        let target = Target::Store(to.clone());
        let exported = changed(base, &wanted, Arc::new(Double), small, &target, &form).await.unwrap();
        let files = all(&to).await;
        assert_eq!(files.len(), exported.files.len());
        let found = tensors(files.iter().filter(|(name, _)| is_weights(name)).map(|(_, bytes)| bytes));
        let wide = |name: &str| convert::convert(&stored[name].2, Dtype::BF16, Dtype::F32).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found["b.weight"].2, convert::convert(&wide("b.weight"), Dtype::F32, dtype).unwrap());
        let doubled = Double.apply("a.weight", &[40, 3], &stored["a.weight"].2, Dtype::BF16, dtype).unwrap();
        assert_eq!(found["a.weight"].2, doubled);
    }
    assert!(all_are(&folder, vec![entry.clone()], Dtype::BF16).await.unwrap());
    assert!(!all_are(&folder, vec![entry.clone()], Dtype::F32).await.unwrap());

    // A byte that no wanted tensor has.
    harm(&store, &manifest.folder(), &entry.name, crate::checkpoint::testing::Harm::Flip).await;
    let to = Target::Store(memory_store());
    let base = (&folder, vec![entry]);
    let error = changed(base, &wanted, Arc::new(Double), Vec::new(), &to, &Form::plain(30)).await.unwrap_err();
    assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
}

#[test]
fn only_files_of_an_export_are_removed() {
    for (name, is) in [
        ("model-00001-of-00002.safetensors", true),
        ("model-123456-of-123456.safetensors", true),
        ("model-0001-of-00002.safetensors", false),
        ("model-00001-of-00002.safetensors/x", false),
        ("../model-00001-of-00002.safetensors", false),
        ("model-xxxxx-of-00002.safetensors", false),
        ("optimizer-00001-of-00002.safetensors", false),
    ] {
        assert_eq!(is_shard(name), is, "{name}");
    }
    let index = br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "../../x", "c": 7}}"#;
    assert_eq!(shards_of(index), ["model-00001-of-00002.safetensors"]);
    assert_eq!(shards_of(b"not JSON"), [""; 0]);
}
