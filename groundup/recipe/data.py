"""The sections of the data stages: corpus, tokenizer, shards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from groundup.recipe.sections import ByName, Section, Texts, setting


class MinHashSettings(Section):
    """Near-duplicates by MinHash and banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3)."""

    ngram: int = setting(5, "words in a shingle; fewer find more distant copies", ge=1, le=64)
    bands: int = setting(
        14, "bands of the signature; two texts that agree in one whole band are compared", ge=1, le=512
    )
    rows: int = setting(8, "hashes in a band; more make fewer pairs candidates", ge=1, le=64)
    min_agreement: float = setting(
        0.72, "near-duplicates have at least this share of equal hashes (0: sharing one band is enough)", ge=0.0, le=1.0
    )


class ClassifierSettings(Section):
    """A quality classifier that is trained on examples: bags of hashed words and word pairs, as fastText's."""

    positive: Texts = setting(..., "files of good example texts", min_length=1)
    negative: Texts = setting(..., "files of bad example texts", min_length=1)
    min_score: float = setting(0.5, "documents with a lower score (0 to 1) are dropped", ge=0.0, le=1.0)


class DecontaminationSettings(Section):
    """Documents that repeat evaluation data are dropped."""

    files: Texts = setting(..., "evaluation data: JSON, Parquet, CSV or text files, folders or globs", min_length=1)
    ngram: int = setting(13, "words in a row that count as repeated (8 to 13 are usual)", ge=5, le=64)
    max_share: float = setting(
        0.0, "a document is dropped if more than this share of its words is repeated (0: if any is)", ge=0.0, le=1.0
    )


class CorpusSettings(Section):
    """Raw files to clean documents."""

    inputs: Texts = setting(
        ("groundup:classics",),
        "files, folders or globs (.txt .md .rst .log .html .jsonl .json .csv .tsv .parquet .warc .wet, also .gz .zst "
        ".bz2 .xz; a file that is named may end in anything), s3:// gs:// https:// addresses, or a text that ships "
        "with groundup: groundup:classics, groundup:shakespeare",
        min_length=1,
    )
    follow_links: bool = setting(False, "read files outside a folder of inputs that links in it lead to")
    text_field: str = setting("text", "field of a record (JSON, CSV, Parquet) that holds the text")
    source_field: str = setting("", "field that names a record's source (unset: the file's name)")
    separator: str = setting(
        "<|endoftext|>",
        'what stands between documents in a text file, alone on a line if it is <|endoftext|> ("": each text file is '
        "one document)",
        max_length=256,
    )
    unicode: Literal["NFC", "NFKC", "none"] = setting(
        "NFC", "Unicode normalization form; NFKC also unifies ligatures and full-width letters"
    )
    max_document_mib: float = setting(
        16.0,
        "longer plain texts are split at paragraphs or lines; a longer line is set aside",
        gt=0.0,
        le=1024.0,
    )
    extractor: Literal["trafilatura", "resiliparse"] = setting(
        "trafilatura", "how text is extracted from HTML: trafilatura (better text) or resiliparse (many times faster)"
    )
    extract_seconds: float = setting(20.0, "an HTML page that takes longer is set aside", gt=0.0, le=3600.0)
    languages: Texts = setting(("en",), "ISO 639-1 codes to keep; an empty list keeps every language")
    language_floor: float = setting(
        0.0, "the most probable language needs at least this probability (0: any)", ge=0.0, le=1.0
    )
    language_model: str = setting("", "path of a fastText language model, such as lid.176.bin (unset: lid.176.ftz)")
    quality: Texts = setting(("none",), "rules to apply: gopher, c4, fineweb, gentle (for books), or none")
    thresholds: ByName = setting(
        {}, 'rules\' thresholds by name, such as "gopher.min_words" = 30; false switches a rule off'
    )
    predicate: str = setting(
        "", "your own filter, file.py:function; it takes a document and returns whether to keep it"
    )
    privacy: tuple[Literal["email", "phone", "ip", "credit_card"], ...] = setting(
        (), "private data to replace by placeholders: email, phone, ip, credit_card"
    )
    toxic_words: str = setting("", "file of toxic words, one a line (unset: no such filter)")
    max_toxic_share: float = setting(
        0.01, "documents with a larger share of words from toxic_words are dropped", ge=0.0, le=1.0
    )
    dedup: Literal["near", "exact", "none"] = setting(
        "near", "which duplicates to remove: near (which includes exact), exact or none"
    )
    dedup_within: Literal["none", "paragraphs", "lines"] = setting(
        "none", "remove paragraphs or lines that another document has too"
    )
    dedup_within_characters: int | None = setting(
        None, "shorter paragraphs or lines stay (unset: 20 for paragraphs; 1 for lines: those of menus are short)", ge=1
    )
    dedup_substring: int = setting(
        0, "remove runs of at least this many words that occur elsewhere too (0: none; 50 is usual)"
    )
    min_characters: int = setting(1, "shorter documents are dropped", ge=1)
    mix: dict[str, float] = setting(
        {}, 'share of the text by source, such as { "books*" = 0.7, "*" = 0.3 }; documents are dropped or repeated'
    )
    mix_tokens: dict[str, float | Literal["all"]] = setting(
        {}, 'instead of shares: tokens from each source, such as { "books*" = 3e6, "*" = "all" }'
    )
    bytes_per_token: float = setting(
        4.0, "bytes of text that mix_tokens counts as one token (`groundup tokenizer report` measures it)", gt=0.0
    )
    validation_share: float = setting(0.1, "share of the text held out for validation", gt=0.0, lt=1.0)
    validation_by: Literal["auto", "document", "tail"] = setting(
        "auto",
        "document: whole documents, chosen by their id; tail: the end of every document; "
        "auto: document from 20 documents on, else tail",
    )
    minhash: MinHashSettings = Field(default_factory=MinHashSettings, description="how near-duplicates are found")
    classifier: ClassifierSettings | None = None
    decontaminate: DecontaminationSettings | None = None
    workers: int | None = setting(
        None, "worker processes (unset: one a core, for large inputs)", ge=1, le=4096, affects_result=False
    )
    engine: Literal["local", "ray"] = setting(
        "local",
        "local: processes on this machine; ray: a Ray cluster (pip install 'groundup[ray]')",
        affects_result=False,
    )
    split_mib: float = setting(
        64.0, "size of one piece of work for a worker process", gt=0.0, le=65536.0, affects_result=False
    )
    memory_mib: float = setting(1024.0, "memory that one worker process may use", ge=128.0, affects_result=False)

    @model_validator(mode="after")
    def _one_mix(self) -> CorpusSettings:
        if self.mix and self.mix_tokens:
            raise ValueError("mix and mix_tokens are two ways to say one thing: leave one of them out")
        return self


class TokenizerSettings(Section):
    """Documents to `tokenizer.json`."""

    use: str | None = setting(
        None,
        "a run or a tokenizer.json to take the tokenizer from instead of training one (unset: from init)",
        affects_result=False,
    )
    kind: Literal["bpe", "wordpiece", "unigram", "characters"] = setting(
        "bpe", "byte-level BPE, WordPiece, Unigram, or one token per character"
    )
    vocab_size: int = setting(
        2048, "number of tokens, control tokens included (kind characters: decided by the text)", ge=280, le=131_072
    )
    split: Literal["qwen2", "llama3", "gpt2"] | None = setting(
        None, "regex that cuts text before merging (unset: qwen2, digits one by one; llama3 from 32,768 entries on)"
    )
    control_tokens: list[str] = setting(
        [], 'names of further control tokens, such as "<think>", which text never becomes by itself'
    )
    spare_tokens: int = setting(4, "unused control tokens kept for later stages", ge=0, le=1024)
    trainer: Literal["huggingface", "rustbpe"] = setting(
        "huggingface", "trainer of bpe: huggingface, or rustbpe (two to three times as fast; breaks ties differently)"
    )
    sample_mib: float = setting(
        1024.0, "largest sample of the text to train on; every source keeps its share", gt=0.0, le=65536.0
    )


class ShardsSettings(Section):
    """Documents and tokenizer to binary token shards."""

    shard_tokens: int = setting(100_000_000, "largest number of tokens in one shard file", ge=1024, le=2_000_000_000)
    workers: int | None = setting(
        None, "worker processes (unset: one a core, for large inputs)", ge=1, le=4096, affects_result=False
    )
