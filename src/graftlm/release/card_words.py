"""What a run records in English words, said in Chinese: notes, reasons, what was done in training.

Owns the sentences. Other rooms record in English and know no card; what they may record has a line here, and a test
holds the two together. Words that no line knows are quoted as they were recorded.
"""

from __future__ import annotations

import re

TOO_LONG = {"drop": ("left out", "舍弃"), "cut_at_turn": ("cut between two turns", "在两轮之间截断")}
"""What becomes of rows that are too long, in English and in Chinese."""

ACTIONS = {"rollback": "回退"}
"""What training did about itself."""

# `{}` stands for what changes: the same places in the same order on both sides.
_SENTENCES = {
    # why a row is not learned from
    "not drawn into the sample": "未被抽中",
    "exact duplicate": "完全重复",
    "near duplicate": "近似重复",
    "also held out": "与留出集相同",
    "a plain text, not a dialogue": "纯文本，不是对话",
    "nothing in it is learned": "没有可学的内容",
    "its prompt alone is longer than {} tokens": "仅提问就超过 {} 个词元",
    "longer than {} tokens": "超过 {} 个词元",
    "refused by the template: {}": "不合模板：{}",
    "less than {} of its letters in script {}": "字母中属于该文字的不足 {}（{}）",
    "an empty text": "空文本",
    "no turn at all": "没有任何一轮",
    "no question before the answer": "回答之前没有提问",
    "turns out of order": "轮次顺序有误",
    "no answer": "没有回答",
    "an empty answer": "回答为空",
    "an empty question": "提问为空",
    "not an object of fields": "不是由字段组成的对象",
    "a turn is no object of fields": "某一轮不是由字段组成的对象",
    "an instance is no object of fields": "某一项不是由字段组成的对象",
    "no field {}": "没有字段 {}",
    "{} is not text but {}": "{} 不是文本，而是 {}",
    "{} is not a list but {}": "{} 不是列表，而是 {}",
    "history is not a list of [question, answer]": "history 不是 [问, 答] 的列表",
    "a turn that calls or answers a tool": "含工具调用或其结果",
    "a turn of an unknown sender": "发言者身份未知",
    "an answer of weight 0, which is not to be learned": "回答的权重为 0，不应学习",
    "a part of a turn that is not text": "含非文本内容",
    "broken characters (U+FFFD)": "字符已损坏（U+FFFD）",
    "broken Unicode (lone surrogates)": "Unicode 已损坏（孤立代理项）",
    "a field given twice": "同一字段出现两次",
    "JSON nested too deeply": "JSON 嵌套过深",
    "not JSON": "不是 JSON",
    "not UTF-8": "不是 UTF-8",
    "not CSV ({})": "不是 CSV（{}）",
    "more or fewer fields than the first line names": "字段数与首行不符",
    # what was cut
    "longer than the limit: cut at a turn": "超过长度上限，在两轮之间截断",
    "a last question without an answer": "最后一问没有回答",
    # notes of the graft
    "The published merge scores every new piece 0, above every piece of the base: {} of {} texts without the script "
    "({}) are now encoded differently. Only tokenizer.model is written: no tokenizer.json can encode alike: with XY "
    "and YX both new and tied at score 0, SentencePiece cuts XYX as XY+X and YXY as YX+Y, which no order of merges "
    "does.": (
        "公开的合并方式给每个新词片 0 分，高于基座的所有词片：有 {} 条（共 {} 条，占 {}）不含该文字的文本编码改变。"
        "只写出 tokenizer.model，因为没有任何 tokenizer.json 能给出同样的编码：当 XY 与 YX 都是新词片且同为 0 分时，"
        "SentencePiece 把 XYX 切成 XY+X，把 YXY 切成 YX+Y，这是任何合并顺序都做不到的。"
    ),
    "{} pieces were asked for and {} learned: nothing else that may be a piece occurs twice in the texts; more text "
    "gives more.": "要求 {} 个词片，学到 {} 个：文本中再没有出现两次、可作词片的内容；文本越多，学到越多。",
    "{} pieces were asked for and {} learned: nothing else that may be a piece occurs twice in the texts; more text "
    "gives more. {} were left out, told under dropped.": (
        "要求 {} 个词片，学到 {} 个：文本中再没有出现两次、可作词片的内容；文本越多，学到越多。另有 {} 个未采用。"
    ),
    "Text without a character of the script {} is encoded as before. Other languages written in it are encoded with "
    "the new pieces too; expanding those always gives the base's ids.": (
        "不含 {} 文字的文本，编码与从前相同。用该文字书写的其他语言也会用到新词片；"
        "把新词片展开，得到的总是基座的编号。"
    ),
    "No text in the script was given, so compression was not measured (--text).": (
        "没有给出用该文字书写的文本，因此未测量压缩率（--text）。"
    ),
    "{} of the new pieces are parts of characters, steps on the way to longer ones.": (
        "新词片中有 {} 个只是字符的一部分，是合成更长词片的中间步骤。"
    ),
    # what happened in training
    "stopped early: held-out loss no longer improves": "提前停止：留出集损失不再下降",
    "Step {}: {} Rolled back to step {}; the learning rate is {} of the recipe's from there on.": (
        "第 {} 步：“{}” 已回退到第 {} 步，此后学习率为配方的 {} 倍。"
    ),
    "Step {}: {} Rolled back to step {}; the learning rate is {} of the recipe's from there on, cut for {}.": (
        "第 {} 步：“{}” 已回退到第 {} 步，此后学习率为配方的 {} 倍，部分更低（“{}”）。"
    ),
    "Step {}: {} Rolled back to step {}; from there on the recipe's learning rate is cut for {}, and stays for the "
    "others.": "第 {} 步：“{}” 已回退到第 {} 步，此后只降低部分学习率（“{}”，相对配方），其余不变。",
}  # fmt: skip


def _pattern(sentence: str) -> re.Pattern[str]:
    return re.compile("(.+?)".join(map(re.escape, sentence.split("{}"))), re.DOTALL)


_KNOWN = [(_pattern(english), chinese) for english, chinese in _SENTENCES.items()]


def in_chinese(recorded: str) -> str:
    """What a run recorded, in Chinese; words that are not known are quoted."""
    for pattern, chinese in _KNOWN:
        found = pattern.fullmatch(recorded)
        if found:
            return chinese.format(*found.groups())
    return f"“{recorded}”（运行记录原文）"
