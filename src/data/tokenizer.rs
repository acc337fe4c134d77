//! x
#[cfg(test)]
mod tests {
    use tokenizers::models::bpe::*; use tokenizers::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    #[test]
    fn lib_determinism() {
        let mut texts=vec![];
        for dir in ["tokio-1.54.1/src","object_store-0.14.2/src"] {
            let home=std::env::var("HOME").unwrap();
            let reg=std::fs::read_dir(format!("{home}/.cargo/registry/src")).unwrap().next().unwrap().unwrap().path();
            let mut fs: Vec<_> = glob::glob(&format!("{}/{dir}/**/*.rs",reg.display())).unwrap().map(|p|p.unwrap()).collect(); fs.sort();
            for f in fs { texts.push(std::fs::read_to_string(f).unwrap()); }
        }
        let total: usize=texts.iter().map(|t|t.len()).sum();
        let mut seen=std::collections::HashMap::<u64,u32>::new();
        for i in 0..8 {
            let t=std::time::Instant::now();
            let mut tk=TokenizerImpl::<BPE,NormalizerWrapper,ByteLevel,ByteLevel,ByteLevel>::new(BPE::default());
            tk.with_pre_tokenizer(Some(ByteLevel::new(false,true,true)));
            let mut tr=BpeTrainer::builder().show_progress(false).vocab_size(4096).initial_alphabet(ByteLevel::alphabet().into_iter().collect()).special_tokens(vec![AddedToken::from("<|endoftext|>",true)]).build();
            tk.train(&mut tr, texts.iter().map(|s|s.as_str())).unwrap();
            let s=tk.to_string(false).unwrap();
            *seen.entry(crc_fast::crc64_nvme(s.as_bytes())).or_default()+=1;
            println!("{i} {} bytes {:?} {:?}",total,t.elapsed(),seen);
        }
    }
}
