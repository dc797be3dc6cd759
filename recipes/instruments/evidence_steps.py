"""The steps of recipes/evidence.py."""

from __future__ import annotations

from dataclasses import dataclass

COMMAND = "hf-longtrunc"


@dataclass(frozen=True)
class Step:
    """One claim: its folder, its title, the command at either size; TEXT and OUT stand for paths.

    A command is a script of this folder, `hf-longtrunc`, or `-m` and a module of the repository that one stands in.
    A step without a quick form takes two CPU cores longer than `--quick` may, and runs if it is named. One without a
    command is history: its records and page stay, and the recipe went; git has it.
    """

    name: str
    shows: str
    quick: str | None
    full: str | None


NOVELS = "great_expectations.txt,pride_and_prejudice.txt"
STEPS = [
    Step("readme", "README's blocks, what each prints and what it costs", None, "readme.py"),
    Step(
        "samplers",
        "Truncation samplers on a human text and behind a repeated phrase",
        "samplers.py --text TEXT --tokens 200 --new-tokens 48 --out OUT",
        "samplers.py --text TEXT --tokens 2000 --new-tokens 512 --seeds 0,1,2 --out OUT",
    ),
    Step(
        "samplers-prose",
        "The same on the beginning of a novel",
        None,
        "samplers.py --text TEXT --tokens 300 --new-tokens 48 --out OUT",
    ),
    Step(
        "sampler-battery",
        "Every truncation sampler at one share of refused human tokens",
        None,
        "sampler_battery.py --texts TEXT --windows 100 --continuations 1:300,0.7:100,1.3:100 --out OUT",
    ),
    Step(
        "grpo-truncated",
        "GRPO on truncated samples: log-probabilities of the kept sets against those of the full vocabulary",
        None,
        "grpo_truncated.py --out OUT",
    ),
    Step(
        "truncated-ratios",
        "Log-probabilities of truncated samples: of the kept sets and of the full vocabulary",
        None,
        "truncated_ratios.py",
    ),
    Step(
        "truncated-ratios-generated",
        "The same on tokens that the model writes: the forwards that drew them, and others",
        None,
        "truncated_ratios.py --generated 8",
    ),
    Step("vllm", "Requests of one served batch that ask for different things, in a real vLLM", None, "serve_vllm.py"),
    Step("vllm-masks", "Kept sets recorded in a real vLLM beside the processors'", None, "vllm_masks.py"),
    Step(
        "hosts-doors",
        "Exported folders in five hosts of transformers, beside the context manager",
        None,
        "serve_endless.py --text TEXT --parts doors --out OUT",
    ),
    Step(
        "hosts-serve",
        "A chat of 50,000 tokens with `transformers serve`, through the openai client",
        None,
        "serve_endless.py --text TEXT --parts serve --window 256 --out OUT",
    ),
    Step(
        "hosts-receipts",
        "The passages that an exported folder answers from, on novels and wordings that nothing was chosen on",
        None,
        "receipts.py --texts great_expectations.txt,pride_and_prejudice.txt --out OUT",
    ),
    Step(
        "eta-flag",
        "Eta on the full distribution and as transformers' flag behind top-k",
        "eta_flag.py --out OUT",
        "eta_flag.py --out OUT",
    ),
    Step(
        "matching",
        "The parameters at which the samplers refuse the same share of a text",
        f"{COMMAND} match TEXT --max-tokens 128 --picture OUT/match.png",
        f"{COMMAND} match TEXT --max-tokens 512 --picture OUT/match.png",
    ),
    Step(
        "perplexity",
        "LM-Infinite past the trained window: perplexity by position",
        f"{COMMAND} ppl TEXT --tokens 12288 --output-dir OUT",
        f"{COMMAND} ppl TEXT --tokens 65536 --output-dir OUT",
    ),
    Step(
        "dual-chunk",
        "Dual chunk attention past the trained window: perplexity by position, beside LM-Infinite",
        None,
        'dual_chunk.py --text TEXT --only "LM-Infinite, a quarter;dual chunk" --out OUT',
    ),
    Step(
        "dual-chunk-2",
        "The same on another text",
        None,
        'dual_chunk.py --text TEXT --only "dual chunk;LM-Infinite, a quarter" --out OUT',
    ),
    Step(
        "dual-chunk-window",
        "What the unmodified model makes of the same tokens when it reads its last window anew at every half of one",
        None,
        'dual_chunk.py --text TEXT --only "window re-computed" --out OUT',
    ),
    Step(
        "dual-chunk-window-2",
        "The same on the other text",
        None,
        'dual_chunk.py --text TEXT --only "window re-computed" --out OUT',
    ),
    Step(
        "streaming-llm",
        "StreamingLLM with LM-Infinite's sinks and window, on the text of `dual-chunk`: perplexity by position",
        None,
        'dual_chunk.py --text TEXT --only "StreamingLLM, a quarter" --tokens 12288 --out OUT',
    ),
    Step("dual-chunk-cost", "One layer under dual chunk attention", None, "benchmarks/dual_chunk.py"),
    Step("decode-cost", "A decoded token of all layers, as it is and patched", None, "benchmarks/decode.py --out OUT"),
    Step(
        "reading",
        "Facts that a novel states once, asked for in a chat: dual chunk attention alone and with blocks",
        None,
        None,
    ),
    Step("reading-long", "The same past the trained window", None, None),
    Step(
        "reading-beside",
        "What that reading costs: facts right before their question, a second turn, a text that goes on",
        None,
        None,
    ),
    Step(
        "reading-window",
        "Facts all over a text inside the window: the model alone, with blocks, and LM-Infinite with TopBlocks",
        None,
        None,
    ),
    Step("reading-32k", "Facts in four times the trained window", None, None),
    Step(
        "asking-choose",
        "What `ask` finds and answers on the novels and wordings that its settings were chosen on",
        None,
        "asking.py --part choose --texts bleak_house.txt,moby_dick.txt --lengths 7500 --each 4 --out OUT",
    ),
    Step(
        "off-topic",
        "How often `ask` reads a passage for a question that has nothing to do with the text",
        None,
        "off_topic.py --texts bleak_house.txt,moby_dick.txt --out OUT",
    ),
    Step(
        "asking",
        "What `ask` finds and answers in novels and wordings that nothing was chosen on",
        None,
        f"asking.py --texts {NOVELS},middlemarch.txt --lengths 7500,12000,16000 --each 2 --conversations "
        "--arms ask,finder,encoder,bm25 --out OUT",
    ),
    Step(
        "asking-trailing",
        "Right passages when one of twelve instructions follows the question",
        None,
        f"asking.py --texts {NOVELS},middlemarch.txt --lengths 12000 --each 2 --trailing --no-read --arms ask "
        "--out OUT",
    ),
    Step(
        "asking-hops",
        "Facts in two places, found one after the other",
        None,
        f'asking.py --texts {NOVELS},middlemarch.txt --lengths 7500 --each 6 --kinds "two hops" --hops 2 --arms ask '
        "--out OUT",
    ),
    Step(
        "asking-hops-nothing",
        "How often `hops=2` reads passages for a question that the text does not answer",
        None,
        f'asking.py --texts {NOVELS},middlemarch.txt --lengths 7500 --each 6 --kinds "off-topic,unknown name,unsaid" '
        "--hops 2 --no-read --arms ask --out OUT",
    ),
    Step(
        "asking-long",
        "`ask` on 128,000 and a million tokens: right passages, time, memory, a saved index",
        None,
        f"asking_long.py --texts {NOVELS},middlemarch.txt,bleak_house.txt,moby_dick.txt --out OUT",
    ),
    Step(
        "blocks",
        "Whether the blocks that a chat's question selects hold its answer, with instructions after the question",
        None,
        "block_choice.py --texts middlemarch.txt --out OUT",
    ),
    Step(
        "ruler",
        "Three of RULER's tasks up to twice the trained window: `ask`, and its best passage by words alone",
        None,
        "ruler.py --arms ask,bm25 --tasks niah_single_1,niah_multikey_2,niah_multikey_3 --out OUT",
    ),
    Step(
        "ruler-read",
        "Three of these tasks at half the trained window, read whole and under LM-Infinite",
        None,
        "ruler.py --arms unmodified,lm-infinite --lengths 4096 --limit 5 "
        "--tasks niah_single_1,niah_multikey_2,niah_multikey_3 --out OUT",
    ),
    Step(
        "memory",
        "LM-Infinite over a long stream: memory and time",
        "constant_memory.py --tokens 200000 --out OUT",
        "constant_memory.py --tokens 1000000 --every 100000 --out OUT",
    ),
    Step(
        "prompt-memory",
        "Memory of a long prompt given to generate, read in chunks by itself and left whole",
        "constant_memory.py --prompts 20000,80000 --out OUT",
        "constant_memory.py --prompts 20000,80000 --out OUT",
    ),
    Step(
        "streaming",
        "Tokens a second, read one at a time, along a stream",
        None,
        "lm_infinite.py --text TEXT --parts streaming --windows 512 --stops 10000,30000,100000 --chunk 1024 --out OUT",
    ),
    Step(
        "hybrid",
        "A tiny hybrid trained at 256 bytes, read to 8,192: perplexity by position, and its cache",
        None,
        "hybrid_tiny.py --texts TEXT --held-out moby_dick.txt,sherlock_holmes.txt --out OUT",
    ),
    Step(
        "passkey",
        "Reading what the window lost: passkeys by depth",
        "passkey.py --lengths 2000 --depths 0.1,0.5,0.9 --keys 1 --window 512 --out OUT",
        "passkey.py --lengths 4000,7500,16000,32000 --keys 4 --text TEXT --window 2048 --out OUT",
    ),
    Step(
        "passkey-prose",
        "The same in the prose of a novel, ten keys a length",
        None,
        "passkey.py --text TEXT --lengths 7500,12000 --keys 2 --window 2048 --arms blocks --seed 3 --out OUT",
    ),
    Step(
        "passkey-prose-arms",
        "The shortest of these prompts for the unmodified model and for the paper's setting",
        None,
        "passkey.py --text TEXT --lengths 7500 --keys 2 --window 2048 --arms unmodified,paper --seed 3 --out OUT",
    ),
    Step(
        "passkey-prose-long",
        "The same at two and four times the trained window",
        None,
        "passkey.py --text TEXT --lengths 16000,32000 --keys 2 --window 2048 --arms blocks --seed 3 --out OUT",
    ),
    Step(
        "passkey-prose-more",
        "The same in other novels, twenty keys each",
        None,
        "passkey.py --text TEXT --lengths 7500 --keys 4 --window 2048 --arms blocks --seed 4 --out OUT",
    ),
    Step(
        "passkey-repeated",
        "Fifty keys in repeated filler",
        None,
        "passkey.py --lengths 12000 --keys 10 --window 2048 --arms blocks --dtype bfloat16 --out OUT",
    ),
    Step(
        "passkey-repeated-long",
        "Twenty keys in repeated filler at four times the trained window",
        None,
        "passkey.py --lengths 32000 --keys 4 --window 2048 --arms blocks --dtype bfloat16 --out OUT",
    ),
    Step(
        "passkey-repeated-long-2",
        "The same with another seed",
        None,
        "passkey.py --lengths 32000 --keys 4 --window 2048 --arms blocks --seed 1 --dtype bfloat16 --out OUT",
    ),
    Step(
        "passkey-repeated-long-3",
        "Ten more: fifty in all",
        None,
        "passkey.py --lengths 32000 --keys 2 --window 2048 --arms blocks --seed 2 --dtype bfloat16 --out OUT",
    ),
    Step(
        "unlimiformer",
        "Unlimiformer: trained at 32 tokens, read at 65,536",
        "unlimiformer_passkey.py",
        "unlimiformer_passkey.py",
    ),
    Step(
        "packing",
        "Best-fit packing beside concatenation, and that documents stay apart",
        f"{COMMAND} demo packing --output-dir OUT",
        f"{COMMAND} demo packing --output-dir OUT",
    ),
    Step(
        "cream",
        "CREAM: trained at 64 tokens, read at 512, beside its baselines",
        "cream_tiny.py",
        "cream_tiny.py",
    ),
    Step("cream-third-seed", "The same with another seed", None, "cream_tiny.py --seeds 2"),
    Step(
        "cream-coverage",
        "The relative distances that CREAM's positions meet",
        "cream_coverage.py --out OUT",
        "cream_coverage.py --out OUT",
    ),
    Step("pema", "PEMA: a wording learned beside a frozen model", None, "pema.py --out OUT"),
    Step("uld", "ULD: facts suppressed, others kept", None, "uld.py --alphas 0.3,0.4,0.5,0.75 --out OUT"),
    Step(
        "processors-cost",
        "What a truncation step costs beside transformers' own",
        None,
        "benchmarks/processors.py --batch 1 32 --threads 1 2",
    ),
    Step(
        "ranks-cost",
        "What top-H, min-k, XTC and DRY cost beside transformers' top-h, sorts and loops, and a softmax",
        None,
        "benchmarks/processors.py --samplers ranks --peaked --vocab 49152 128256 --batch 1 8 --threads 1 --turns 5",
    ),
    Step(
        "closed-forms",
        "The threshold samplers beside their formulas in double precision, along a novel",
        None,
        "closed_forms.py TEXT --rows 10240",
    ),
    Step("packing-cost", "What a packing plan costs", None, "benchmarks/packing.py --large"),
    Step("trl-packing", "Packing in TRL and here, to the first batch", None, "benchmarks/trl_packing.py"),
    Step(
        "packing-cluster",
        "Packing in four processes from one plan, and in one",
        None,
        "cluster/pack_shards.py --synthetic 10000000 --check",
    ),
    Step("packing-cluster-sizes", "Plans of up to 1e10 documents", None, "cluster/pack_shards.py --arithmetic"),
    Step("packed-ranks", "Packed rows in one process, under DDP and under FSDP2", None, "packed_ranks.py"),
    Step("streams-cost", "Resuming a stream beside datasets, and its pool's memory", None, "benchmarks/streams.py"),
    Step("resumed-streams", "Random streams resumed at every row", None, "resumed_streams.py --streams 1000"),
    Step(
        "resumed-streams-processes",
        "Some of them with real workers, under StatefulDataLoader",
        None,
        "resumed_streams.py --streams 12 --loaders",
    ),
    Step("resumed-streams-gloo", "The same by two gloo processes", None, "resumed_streams.py --streams 8 --gloo"),
    Step("equal-steps", "How long ranks wait for each other, simulated", None, "equal_steps.py"),
    Step("equal-steps-ranks", "The same on two real ranks, operations counted", None, "equal_steps.py --train"),
    Step("hybrids-cost", "What resetting the states of hybrids costs", None, "benchmarks/hybrids.py --turns 2"),
    Step("killed", "kill -9 of whatever writes", None, "killed.py"),
    Step(
        "packing-helps",
        "Best-fit rows, concatenate-and-cut and padding at equal tokens, small",
        None,
        "does_packing_help.py --novels bleak_house.txt moby_dick.txt great_expectations.txt TEXT --bf16 --out OUT",
    ),
    Step(
        "bat-cost",
        "What a basis-aware check costs beside the linear program",
        None,
        "benchmarks/bat.py --problems 60 --highs 10 --rows 15 --tokens 40",
    ),
    Step(
        "bat-masks",
        "Basis-aware masks on the rows of a novel, the flattest among them",
        None,
        "benchmarks/bat.py --problems 0 --rows 0 --tokens 0 --masks 200 --text TEXT",
    ),
    Step(
        "bat-generation",
        "Drawing and generating with basis-aware truncation",
        None,
        "benchmarks/bat.py --problems 0 --rows 0 --tokens 128",
    ),
    Step(
        "bat-published",
        "A basis-aware check beside the published formulation",
        None,
        "benchmarks/bat.py --tau 0.01 --problems 2 --highs 2 --cvxpy 2 --rows 1 --tokens 0",
    ),
    Step(
        "attention-cost",
        "A decoded token under LM-Infinite, through one layer and through a whole model",
        "benchmarks/lm_infinite.py --device cpu --parts decode,model --repeats 3 --out OUT",
        "benchmarks/lm_infinite.py --out OUT",
    ),
    Step(
        "histories",
        "Random histories under LM-Infinite: rows, padding, holes, turns, crops, patches",
        None,
        "-m tests.attention.machine 10000",
    ),
    Step(
        "histories-streaming",
        "The same under StreamingLLM",
        None,
        "-m tests.attention.machine 3400 StreamingHistories",
    ),
    Step(
        "histories-chunks",
        "The same under dual chunk attention, a model with windowed layers among them",
        None,
        "-m tests.attention.machine 3400 ChunkHistories",
    ),
    Step(
        "compiled-decoding",
        "The graphs of compiled decoding under LM-Infinite",
        None,
        "-m tests.attention.compiled_decode 1000",
    ),
    Step(
        "prefill-cost",
        "A prompt through one layer: LM-Infinite beside masked calls and a plain window",
        None,
        "benchmarks/lm_infinite.py --device cpu --parts prefill --sizes 8192,16384,32768 --windows 1024,2048,4096 "
        '--dtypes float32,bfloat16 --sides "window only,masked,LM-Infinite" --repeats 2 --out OUT',
    ),
    Step(
        "prefill-cost-cell",
        "The cell of that where LM-Infinite gained least, in ten turns",
        None,
        "benchmarks/lm_infinite.py --device cpu --parts prefill --sizes 16384 --windows 1024 "
        '--sides "window only,masked,LM-Infinite" --repeats 10 --out OUT',
    ),
    Step(
        "model-cost",
        "A long prompt and a decoded token, unmodified and under LM-Infinite",
        None,
        "benchmarks/lm_infinite.py --device cpu --parts model --prompts 32768 --layers 4 --model-windows 4096 "
        "--repeats 1 --out OUT",
    ),
    Step("retrieval-cost", "A decoding step under Unlimiformer", None, "benchmarks/unlimiformer.py --out OUT"),
    Step(
        "index-cost",
        "A FAISS index beside the exact search",
        None,
        'benchmarks/unlimiformer.py --states 65536 --indexes "Flat;HNSW32;IVF256,Flat:nprobe=16;IVF256,Flat:nprobe=64"',
    ),
]
