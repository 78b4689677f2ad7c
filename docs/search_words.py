"""What the documentation's build changes in its search index: the words of Chinese text are told apart.

The theme finds words and their beginnings. Chinese has no spaces between words, so without this a whole sentence is a
word, and only how sentences begin is found.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

BOUNDARY = "\u200b"
"""Not seen by readers; the separator of the search in mkdocs.yml has it."""

# Short ones: of "量化因子" each part is found if both are listed. What is between words of the list counts as one word.
_LISTED = """
量化 因子 校准 冻结 学习 训练 重训练 微调 蒸馏 教师 推理 评估 验证 测试 预测 权重
激活 范围 截断 饱和 利用 漂移 比特 整数 浮点 伪量化 舍入 取整 移位 累加 分辨率 量化级
离群 直方图 数值 精度 损失 梯度 裁剪 动量 平均 统计 优化 步长 学习率 参数 随机 种子
恢复 继续 中断 终止 保存 加载 导出 部署 转换 还原 融合 共享 跳过 覆盖 取代 优先 匹配
通配 层名 类型 名称 字段 含义 取值 默认 说明 形式 写法 格式 配置 选项 设置 简易 记录
文件 文件夹 路径 检查 比较 提取 显示 打印 生成 输出 输入 通道 张量 形状 数据流 数据
样本 顺序 批次 网络 模型 模块 子模块 卷积 分组 循环 线性 注意力 归一化 池化 嵌入 序列
填充 调度 阶段 计划 首次 开始 结束 之前 之后 最后 间隔 周期 比例 时刻 监控 监测 测量
指标 报告 图表 曲线 概览 信噪比 噪声 信号 日志 进度 警告 报错 错误 信息 原因 处理
办法 问题 常见 命令 命令行 安装 环境 依赖 版本 仓库 脚本 示例 接口 参考 快速 上手
迁移 对比 昇腾 硬件 设备 驱动 固件 算子 加速器 策略 单卡 多卡 服务器 主机 进程 线程
通信 集合 同步 归约 切分 内存 显存 带宽 网卡 端口 防火墙 连接 等待 超时 启动 集群
容器 作业 编译 性能 分析 速度 耗时 开销 混合 双精度 半精度 逐层 逐通道 逐比特 一致
相同 不同 差异 变化 更新 重新 固定 初始 最大 绝对值 上界 下界 正常 异常 退出 显式
指定 支持 拒绝 无法 能够 可以 不能 需要 不需要 必须 没有 如果 否则 因为 因此 所以
以及 或者 其中 其他 其余 所有 每个 每次 一个 一次 多个 自己 自定义 使用 提供 表示
取决 打包 成对 权限 原子 写入 读取 监听 平滑 剪枝 稀疏 原型 内核 移动端 大语言模型
编码器 分类器 表格 图像 手写 数字 前向 反向 计算图 控制流 关键字 对象 运行 计算 保持
内部 单机 多机 单步 求和 预热 计时 单个 现有 已有 通常 常常 往往 随时间 本机 节点
编号 符号 链接 挂载 复制 缩放 尾数 分片 聚集 并行 完整 已经 尚未 发散 例如 代替 改用
对应 全部 准备 通过 某个 内容 列出 查看 当前 只有 无需 写错 解决 隐藏 列表 建立 调用
手动 损坏 增大 减小 来自 便于 字节 文本 直接 完全 全局 普通 前提 照常 另行 凡是 独立
着色 附加 了解 下降 感知 压缩 工具 过程 代价 累积 搜索 接受 认识 空闲 碎片 温度 滑动
矛盾 重复 缺失 失败 忽略 可信 改正 笔误 映射 例外 矩阵 乘法 运算 元素 标量 未知 分布
类名 签名 丢失 整个 任意 任何 基准 占用 这里 这些 此时 无论 基本 概念 创建 选择 执行
出错 单元格 可学习 循环层 学到 插件 分配 顶层 信任 合并 预留 打开 缺少 允许 可用 省略
用途 删去 禁用 抖动 阻塞 等价
"""
WORDS = tuple(_LISTED.split())

_HAN = "[\u4e00-\u9fff]"
_WORD = "|".join(sorted(WORDS, key=len, reverse=True))
_PIECES = re.compile(f"(?:{_WORD})|(?:(?!{_WORD}){_HAN})+")


def words_of(run: str) -> list[str]:
    """Split Chinese text without spaces or punctuation into words.

    A single character that is left over goes with the word before it: alone it would be found too often.

    Args:
        run: The text.

    Example:
        >>> words_of("量化因子的范围")
        ['量化', '因子的', '范围']
    """
    words: list[str] = []
    for piece in _PIECES.findall(run):
        if len(piece) == 1 and words:
            words[-1] += piece
        else:
            words.append(piece)
    return words


def marked(text: str) -> str:
    """Put a boundary around each Chinese word.

    Args:
        text: Any text.

    Example:
        >>> marked("用 scale 量化").split(BOUNDARY)
        ['', '用', ' scale ', '量化', '']
    """
    return re.sub(f"{_HAN}+", lambda run: BOUNDARY.join(["", *words_of(run[0]), ""]), text)


@event_priority(-100)  # after the plugin that writes the index
def on_post_build(config: MkDocsConfig) -> None:
    """Write the index anew."""
    path = Path(config.site_dir) / "search" / "search_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for entry in index["docs"]:
        entry |= {field: marked(entry[field]) for field in ("title", "text")}
    path.write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
