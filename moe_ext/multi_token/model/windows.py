"""What each head should say at every position of a text: the token of its offset, or OFF after the end.

At position t the backbone itself predicts x_{t+1}; head j predicts x_{t+1+j}. Where the text has ended before that
token, head j should say OFF.

Shape letters: B rows, L tokens, H heads.
"""

import torch
from torch import Tensor

from moe_common.text.packing import IGNORED_LABEL


def window_targets(labels_BL: Tensor, *, num_heads: int, end_ids: list[int], off_id: int) -> Tensor:
    """[B, L, H + 1] targets of every position's window; column 0 is the backbone's own token, column j head j's.

    Args:
        labels_BL: the tokens, not shifted; -100 for those that are not to be learnt (a prompt, padding).
        num_heads: H.
        end_ids: tokens that end a text. After one, within the same window, every head's target is OFF.
        off_id: the class that stands for OFF.

    A target is -100 where its token is, or lies beyond the row's end and the text has not ended, and in all columns
    where column 0 is: a window is learnt whole or not at all.
    """
    num_rows, length = labels_BL.shape
    beyond = labels_BL.new_full((num_rows, num_heads + 1), IGNORED_LABEL)
    windows_BLW = torch.cat([labels_BL, beyond], dim=1)[:, 1:].unfold(1, num_heads + 1, 1)[:, :length]
    ends_BLW = torch.isin(windows_BLW, labels_BL.new_tensor(end_ids)).long()
    ended_BLW = (ends_BLW.cumsum(dim=-1) - ends_BLW) > 0
    targets_BLW = torch.where(ended_BLW, off_id, windows_BLW)
    return torch.where(windows_BLW[..., :1] == IGNORED_LABEL, IGNORED_LABEL, targets_BLW)
